"""x / sqrt(mean(x²) + eps) · weight over the last axis.

One program normalizes one row. A row of BLOCK columns or fewer is loaded once, together with the weight, so that few
rows take one latency of memory. Of a longer one it sums the squares BLOCK columns at a time, then reads it again, from
cache. A row may have any length.

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
FEW_ROWS = [[64, 2], 0]  # while there are fewer programs than a GPU runs at once, a row is to be done soon
BY_TARGET = dict.fromkeys(("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120"), FEW_ROWS)


def launch_cost(config: Config, rows: int, e: int, dtype: str) -> LaunchCost:
    """The weight is read once, and a row that is longer than a block twice."""
    block, size = config["BLOCK"], DTYPE_BYTES[dtype]
    return LaunchCost(
        programs=rows,
        bytes=(3 if e <= block else 4) * e * size,
        bytes_per_stage=3 * e * size if e <= block else block * size,
        elementwise_ops=8 * block * cdiv(e, block),
    )


SPACE = SearchSpace(
    {"BLOCK": [128, 256, 512, 1024, 2048, 4096, 8192], "num_warps": [1, 2, 4, 8, 16], "num_stages": [1]},
    is_valid=lambda config, e, **_: 32 * config["num_warps"] <= config["BLOCK"] <= max(128, next_power_of_2(e)),
    launch_cost=launch_cost,
)


@triton.jit
def load_columns(ptr, offs, stride, E):
    """Columns `offs` of a row of E, as float32; 0 beyond them."""
    return tl.load(ptr + offs * stride, mask=offs < E, other=0).to(tl.float32)


@triton.jit
def store_normed(out_ptr, offs, stride, E, x, rstd, weight):
    """Store x · rstd · weight in columns `offs`."""
    tl.store(out_ptr + offs * stride, (x * rstd * weight).to(out_ptr.dtype.element_ty), mask=offs < E)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    E,
    eps,
    stride_xm,
    stride_xe,
    stride_we,
    stride_om,
    stride_oe,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    out_ptr += row * stride_om
    columns = tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
    if WHOLE:
        x = load_columns(x_ptr, columns, stride_xe, E)
        weight = load_columns(weight_ptr, columns, stride_we, E)
        rstd = tl.rsqrt(tl.sum(x * x, 0) / E + eps)
        store_normed(out_ptr, columns, stride_oe, E, x, rstd, weight)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, E, BLOCK):
            x = load_columns(x_ptr, start + columns, stride_xe, E)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, 0) / E + eps)
        for start in range(0, E, BLOCK):
            x = load_columns(x_ptr, start + columns, stride_xe, E)
            weight = load_columns(weight_ptr, start + columns, stride_we, E)
            store_normed(out_ptr, start + columns, stride_oe, E, x, rstd, weight)


@rms_norm.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True, by_target=BY_TARGET)
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, *, BLOCK: int, num_warps: int, num_stages: int) -> Tensor:
    """Return x [..., e] normalized, in its dtype; raises Unsupported for dtypes and devices it does not serve."""
    check_supported("rms_norm", x, weight)
    rows = x.reshape(-1, x.shape[-1])  # [m, e]
    m, e = rows.shape
    out = torch.empty(m, e, dtype=x.dtype, device=x.device)
    if out.numel():
        _rms_norm_kernel[(m,)](
            rows,
            weight,
            out,
            e,
            eps,
            *(stride for tensor in (rows, weight, out) for stride in tensor.stride()),
            WHOLE=e <= BLOCK,
            BLOCK=BLOCK,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out.view(x.shape)
