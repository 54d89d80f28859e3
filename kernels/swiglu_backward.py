"""The gradients of silu(gate) · up, elementwise: with σ = 1 / (1 + exp(-gate)),

    grad_up = grad_out · gate · σ        grad_gate = grad_out · up · σ · (1 + gate · (1 - σ))

One program computes BLOCK columns of one row, in float32. σ and 1 - σ are quotients of exp(-|gate|), which never
overflows, so that neither is a difference of numbers that are nearly equal.

grad_out, gate and up [s, f], any strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import swiglu_backward
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._launch import check_supported

CONFIGS = [{"BLOCK": 1024, "num_warps": 4, "num_stages": 1}]


def launch_cost(config: Config, s: int, f: int, dtype: str) -> LaunchCost:
    """Return the cost of reading three tensors [s, f] and writing two."""
    block = config["BLOCK"]
    bytes_read = 3 * min(block, f) * DTYPE_BYTES[dtype]
    return LaunchCost(
        programs=s * cdiv(f, block), bytes=5 * bytes_read // 3, bytes_per_stage=bytes_read, elementwise_ops=20 * block
    )


SPACE = SearchSpace(
    {"BLOCK": [128, 256, 512, 1024, 2048, 4096], "num_warps": [1, 2, 4, 8], "num_stages": [1]},
    is_valid=lambda config, f, **_: 32 * config["num_warps"] <= config["BLOCK"] <= max(128, next_power_of_2(f)),
    launch_cost=launch_cost,
)


@triton.jit
def _swiglu_backward_kernel(
    grad_out_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    F,
    stride_os,
    stride_of,
    stride_gs,
    stride_gf,
    stride_us,
    stride_uf,
    stride_xs,
    stride_xf,
    stride_ys,
    stride_yf,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < F
    grad_out = tl.load(grad_out_ptr + row * stride_os + offs * stride_of, mask=mask, other=0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gs + offs * stride_gf, mask=mask, other=0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_us + offs * stride_uf, mask=mask, other=0).to(tl.float32)
    power = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate >= 0, 1.0, power) / (1.0 + power)
    rest = tl.where(gate >= 0, power, 1.0) / (1.0 + power)  # 1 - sigmoid
    grad_gate = grad_out * up * (sigmoid * (1.0 + gate * rest))
    grad_up = grad_out * (gate * sigmoid)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    tl.store(grad_gate_ptr + row * stride_xs + offs * stride_xf, grad_gate.to(dtype), mask=mask)
    tl.store(grad_up_ptr + row * stride_ys + offs * stride_yf, grad_up.to(dtype), mask=mask)


@swiglu_backward.impl("triton", configs=CONFIGS, space=SPACE)
def swiglu_backward_triton(
    grad_out: Tensor, gate: Tensor, up: Tensor, *, BLOCK: int, num_warps: int, num_stages: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up [s, f]; raises Unsupported for dtypes and devices that are not served."""
    check_supported("swiglu_backward", grad_out, gate, up)
    s, f = gate.shape
    grad_gate, grad_up = (torch.empty(s, f, dtype=x.dtype, device=x.device) for x in (gate, up))
    if gate.numel():
        strides = (stride for x in (grad_out, gate, up, grad_gate, grad_up) for stride in x.stride())
        _swiglu_backward_kernel[(s * cdiv(f, BLOCK),)](
            grad_out,
            gate,
            up,
            grad_gate,
            grad_up,
            f,
            *strides,
            BLOCK=BLOCK,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return grad_gate, grad_up
