"""silu(gate) · up = gate / (1 + exp(-gate)) · up, elementwise.

One program computes BLOCK columns of one row, in float32.

gate and up [s, f], any strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import swiglu
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._launch import check_supported

CONFIGS = [
    {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 128, "num_warps": 1, "num_stages": 1},
]


def launch_cost(config: Config, s: int, f: int, dtype: str) -> LaunchCost:
    """Return the cost of multiplying gate and up, each [s, f]."""
    block = config["BLOCK"]
    bytes_read = 2 * min(block, f) * DTYPE_BYTES[dtype]
    return LaunchCost(
        programs=s * cdiv(f, block), bytes=3 * bytes_read // 2, bytes_per_stage=bytes_read, elementwise_ops=12 * block
    )


SPACE = SearchSpace(
    {"BLOCK": [128, 256, 512, 1024, 2048, 4096], "num_warps": [1, 2, 4, 8], "num_stages": [1]},
    is_valid=lambda config, f, **_: 32 * config["num_warps"] <= config["BLOCK"] <= max(128, next_power_of_2(f)),
    launch_cost=launch_cost,
)


@triton.jit
def _swiglu_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    F,
    stride_gs,
    stride_gf,
    stride_us,
    stride_uf,
    stride_os,
    stride_of,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < F
    gate = tl.load(gate_ptr + row * stride_gs + offs * stride_gf, mask=mask, other=0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_us + offs * stride_uf, mask=mask, other=0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * stride_os + offs * stride_of, out.to(out_ptr.dtype.element_ty), mask=mask)


@swiglu.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def swiglu_triton(gate: Tensor, up: Tensor, *, BLOCK: int, num_warps: int, num_stages: int) -> Tensor:
    """Return silu(gate) · up [s, f] in gate's dtype; raises Unsupported for dtypes and devices that are not served."""
    check_supported("swiglu", gate, up)
    s, f = gate.shape
    out = torch.empty(s, f, dtype=gate.dtype, device=gate.device)
    if out.numel():
        strides = (*gate.stride(), *up.stride(), *out.stride())
        _swiglu_kernel[(s * cdiv(f, BLOCK),)](
            gate, up, out, f, *strides, BLOCK=BLOCK, num_warps=num_warps, num_stages=num_stages
        )
    return out
