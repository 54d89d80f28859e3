"""The gradients of x / sqrt(mean(x²) + eps) · weight: with rstd = 1 / sqrt(mean(x²) + eps) and y = x · rstd,

    grad_x = rstd · (grad_out · weight - y · mean(grad_out · weight · y))        grad_weight = Σ_m grad_out · y

One program takes ROWS rows, in blocks of BLOCK columns: once for the two means of every row, then again, from cache,
for grad_x and for the sum of its rows' terms of grad_weight. A second kernel adds up these sums, always in one order.

x and grad_out [..., e] as rows [m, e], any strides; weight [e]; sums in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import rms_norm_backward
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._launch import check_supported

CONFIGS = [{"ROWS": 8, "BLOCK": 512, "num_warps": 8, "num_stages": 1}]
SUM_BLOCKS = {"PARTS": 16, "COLUMNS": 64}  # of the second kernel


def launch_cost(config: Config, rows: int, e: int, dtype: str) -> LaunchCost:
    """x and grad_out are read twice, the sums of each program in float32 written and read."""
    tile, size = config["ROWS"] * config["BLOCK"], DTYPE_BYTES[dtype]
    return LaunchCost(
        programs=cdiv(rows, config["ROWS"]),
        bytes=config["ROWS"] * 5 * e * size + 2 * e * size + 8 * e,
        bytes_per_stage=2 * tile * size,
        elementwise_ops=16 * tile * cdiv(e, config["BLOCK"]),
    )


SPACE = SearchSpace(
    {
        "ROWS": [4, 8, 16, 32],
        "BLOCK": [128, 256, 512, 1024],
        "num_warps": [2, 4, 8, 16],
        "num_stages": [1],
    },
    is_valid=lambda config, e, **_: (
        4 <= config["ROWS"] * config["BLOCK"] // (32 * config["num_warps"]) <= 32
        and config["BLOCK"] <= max(128, next_power_of_2(e))
    ),
    launch_cost=launch_cost,
)


@triton.jit
def load_block(ptr, rows, columns, stride_m, stride_e, M, E):
    """Rows [ROWS, 1] and columns [1, BLOCK] of a tensor [M, E] as float32; 0 beyond it."""
    return tl.load(ptr + rows * stride_m + columns * stride_e, mask=(rows < M) & (columns < E), other=0).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_backward_kernel(
    grad_out_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    parts_ptr,
    M,
    E,
    eps,
    stride_gm,
    stride_ge,
    stride_xm,
    stride_xe,
    stride_we,
    stride_om,
    stride_oe,
    stride_pm,
    stride_pe,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    rows = (pid * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1]
    block = tl.arange(0, BLOCK).to(tl.int64)[None, :]  # [1, BLOCK]
    squares = tl.zeros([ROWS], tl.float32)
    products = tl.zeros([ROWS], tl.float32)
    for start in range(0, E, BLOCK):
        x = load_block(x_ptr, rows, start + block, stride_xm, stride_xe, M, E)
        grad = load_block(grad_out_ptr, rows, start + block, stride_gm, stride_ge, M, E)
        grad *= load_block(weight_ptr, 0, start + block, 0, stride_we, 1, E)
        squares += tl.sum(x * x, 1)
        products += tl.sum(grad * x, 1)
    rstd = tl.rsqrt(squares / E + eps)[:, None]  # [ROWS, 1]
    mean = products[:, None] * rstd / E  # of grad_out · weight · y
    for start in range(0, E, BLOCK):
        columns = start + block
        y = load_block(x_ptr, rows, columns, stride_xm, stride_xe, M, E) * rstd
        grad = load_block(grad_out_ptr, rows, columns, stride_gm, stride_ge, M, E)
        weight = load_block(weight_ptr, 0, columns, 0, stride_we, 1, E)
        grad_x = rstd * (grad * weight - y * mean)
        mask = (rows < M) & (columns < E)
        tl.store(grad_x_ptr + rows * stride_om + columns * stride_oe, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        # Rounded products: a product that is fused into the sum of two lanes is rounded in one of them only, so that
        # lanes which hold the same sum would store different bits.
        part = tl.sum(tl.fma(grad, y, 0.0), 0)[None, :]  # [1, BLOCK]; rows past M are 0
        tl.store(parts_ptr + pid * stride_pm + columns * stride_pe, part, mask=columns < E)


@triton.jit(do_not_specialize=["NUM_PARTS"])
def _sum_parts_kernel(
    parts_ptr, out_ptr, NUM_PARTS, E, stride_pm, stride_pe, stride_oe, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sum [E] of parts [NUM_PARTS, E] float32."""
    columns = (tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]  # [1, COLUMNS]
    acc = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, NUM_PARTS, PARTS):
        part = (start + tl.arange(0, PARTS).to(tl.int64))[:, None]  # [PARTS, 1]
        acc += load_block(parts_ptr, part, columns, stride_pm, stride_pe, NUM_PARTS, E)
    total = tl.sum(acc, 0)[None, :]
    tl.store(out_ptr + columns * stride_oe, total.to(out_ptr.dtype.element_ty), mask=columns < E)


@rms_norm_backward.impl("triton", configs=CONFIGS, space=SPACE)
def rms_norm_backward_triton(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, *, ROWS: int, BLOCK: int, num_warps: int, num_stages: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [..., e] and weight [e], in their dtypes; raises Unsupported for dtypes and devices it
    does not serve.
    """
    check_supported("rms_norm_backward", grad_out, x, weight)
    rows, grads = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, grad_out))  # [m, e] each
    m, e = rows.shape
    num_parts = cdiv(m, ROWS)
    grad_x = torch.empty(m, e, dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(e, dtype=weight.dtype, device=x.device)
    parts = torch.empty(num_parts, e, dtype=torch.float32, device=x.device)
    if grad_x.numel():
        _rms_norm_backward_kernel[(num_parts,)](
            grads,
            rows,
            weight,
            grad_x,
            parts,
            m,
            e,
            eps,
            *(stride for tensor in (grads, rows, weight, grad_x, parts) for stride in tensor.stride()),
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    if e:
        blocks = (cdiv(e, SUM_BLOCKS["COLUMNS"]),)
        strides = (*parts.stride(), *grad_weight.stride())
        _sum_parts_kernel[blocks](parts, grad_weight, num_parts, e, *strides, **SUM_BLOCKS)
    return grad_x.view(x.shape), grad_weight
