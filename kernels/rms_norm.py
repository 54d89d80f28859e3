"""x / sqrt(mean(x²) + eps) · weight over the last axis.

One program normalizes one row: it sums the squares BLOCK columns at a time, then reads the row again, from cache, and
writes it. A row may have any length.

x [..., e] as rows [m, e], any strides; weight [e]; sums in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import rms_norm
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._launch import check_supported

CONFIGS = [
    {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 128, "num_warps": 1, "num_stages": 1},
    {"BLOCK": 4096, "num_warps": 8, "num_stages": 1},
]


def launch_cost(config: Config, rows: int, e: int, dtype: str) -> LaunchCost:
    """The row is read twice, the weight once."""
    block, size = config["BLOCK"], DTYPE_BYTES[dtype]
    return LaunchCost(
        programs=rows,
        bytes=4 * e * size,
        bytes_per_stage=min(block, e) * size,
        elementwise_ops=8 * block * cdiv(e, block),
    )


SPACE = SearchSpace(
    {"BLOCK": [128, 256, 512, 1024, 2048, 4096, 8192], "num_warps": [1, 2, 4, 8, 16], "num_stages": [1]},
    is_valid=lambda config, e, **_: 32 * config["num_warps"] <= config["BLOCK"] <= max(128, next_power_of_2(e)),
    launch_cost=launch_cost,
)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, E, eps, stride_xm, stride_xe, stride_we, stride_om, stride_oe, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    out_ptr += row * stride_om
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, E, BLOCK):
        offs = start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        x = tl.load(x_ptr + offs * stride_xe, mask=offs < E, other=0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 0) / E + eps)
    for start in range(0, E, BLOCK):
        offs = start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        mask = offs < E
        x = tl.load(x_ptr + offs * stride_xe, mask=mask, other=0).to(tl.float32)
        weight = tl.load(weight_ptr + offs * stride_we, mask=mask, other=0).to(tl.float32)
        tl.store(out_ptr + offs * stride_oe, (x * rstd * weight).to(out_ptr.dtype.element_ty), mask=mask)


@rms_norm.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, *, BLOCK: int, num_warps: int, num_stages: int) -> Tensor:
    """Return x [..., e] normalized, in its dtype; raises Unsupported for dtypes and devices it does not serve."""
    check_supported("rms_norm", x, weight)
    rows = x.reshape(-1, x.shape[-1])  # [m, e]
    m, e = rows.shape
    out = torch.empty(m, e, dtype=x.dtype, device=x.device)
    if out.numel():
        strides = (*rows.stride(), *weight.stride(), *out.stride())
        _rms_norm_kernel[(m,)](
            rows, weight, out, e, eps, *strides, BLOCK=BLOCK, num_warps=num_warps, num_stages=num_stages
        )
    return out.view(x.shape)
