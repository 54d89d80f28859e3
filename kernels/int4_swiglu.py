"""silu(x · gateᵀ) · (x · upᵀ) in one pass over x: each program keeps two sums, and writes one result.

A program multiplies BLOCK_N rows of both weights by BLOCK_M rows of x; int4_matmul_splitk.py explains how codes become
numbers. Scales multiply sums in blocks of 16 rows; in larger ones they multiply weights, which are then rounded as
`Int4.rounding` says. Gate and up stay in float32 until they have been multiplied. k is not split: two weights have
twice the rows to fill a GPU with.

x [m, k], any strides; a row of x does not change the result of another.
"""

import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_swiglu
from vila_triton.registry.search_space import SearchSpace

from ._int4_gemm import (
    block_pointers,
    dequantize_block,
    is_promising,
    launch_cost,
    load_group,
    load_words,
    load_x,
    multiply_add,
    store_tile,
    x_pointers,
)
from ._int4_launch import (
    check_int4_call,
    contiguous_tensors,
    fit_block_k,
    rounding_mode,
    stages_for_group,
    target_flags,
)
from ._launch import grid, rows_and_output

CONFIGS = [
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 2, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
]
TILES = [[8, 1], [16, 0], [64, 2], 3]  # configs by rows of x
BY_TARGET = dict.fromkeys(["sm_80", "sm_86", "sm_87", "sm_89", "sm_100", "sm_120"], TILES)
BY_TARGET |= {"sm_90": [[8, 1], [16, 0], [64, 2], 4], "gfx942": [[16, 0], 2]}
SPACE = SearchSpace(
    {
        "BLOCK_M": [8, 16, 32, 64, 128],
        "BLOCK_N": [64, 128],
        "BLOCK_K": [64, 128],
        "num_warps": [2, 4, 8],
        "num_stages": [1, 2, 3, 4],
    },
    lambda config, **sizes: is_promising({**config, "BLOCK_N": 2 * config["BLOCK_N"]}, **sizes),
    lambda config, **sizes: launch_cost({**config, "BLOCK_N": 2 * config["BLOCK_N"]}, **{**sizes, "n": 2 * sizes["n"]}),
)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_swiglu_kernel(
    x_ptr,
    gate_w,
    up_w,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_om,
    GROUP_SIZE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ASM: tl.constexpr,
    OPAQUE: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_N: tl.constexpr = BLOCK_N // 16
    TILES_K: tl.constexpr = BLOCK_K // 64
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # int64 if N is
    rows = tl.where(offs_n < N, offs_n, 0)
    gate_ptrs, top, low = block_pointers(gate_w[0], pid_n, 0, N, K, MASK_N, TILES_N, TILES_K)
    up_ptrs, _, _ = block_pointers(up_w[0], pid_n, 0, N, K, MASK_N, TILES_N, TILES_K)
    x_ptrs = x_pointers(x_ptr, offs_m, 0, M, stride_xm, stride_xk, BLOCK_K)
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    gate_group = load_group(gate_w, top, low, 0, N, K, GROUP_SIZE, ROUNDING, TILES_K)
    up_group = load_group(up_w, top, low, 0, N, K, GROUP_SIZE, ROUNDING, TILES_K)
    tl.assume(K > 0)  # see int4_gemm_tile
    for start in range(0, K, BLOCK_K):
        gate_words = load_words(gate_ptrs, start, K, TILES_K, MASK_K)
        up_words = load_words(up_ptrs, start, K, TILES_K, MASK_K)
        x = load_x(x_ptrs, start, K, BLOCK_K, MASK_K)
        next_gate = load_group(gate_w, top, low, start + BLOCK_K, N, K, GROUP_SIZE, ROUNDING, TILES_K)
        next_up = load_group(up_w, top, low, start + BLOCK_K, N, K, GROUP_SIZE, ROUNDING, TILES_K)
        gate_weights = dequantize_block(gate_words, gate_group, ROUNDING, DTYPE, ASM, OPAQUE, TILES_N, TILES_K)
        up_weights = dequantize_block(up_words, up_group, ROUNDING, DTYPE, ASM, OPAQUE, TILES_N, TILES_K)
        gate = multiply_add(gate_weights, x, gate, gate_w, rows, start, N, GROUP_SIZE, ROUNDING)
        up = multiply_add(up_weights, x, up, up_w, rows, start, N, GROUP_SIZE, ROUNDING)
        gate_group, up_group = next_gate, next_up
        gate_ptrs += TILES_K * 128
        up_ptrs += TILES_K * 128
        x_ptrs += tl.full([1, 1], BLOCK_K, tl.int64) * stride_xk
    out = gate / (1.0 + tl.exp(-gate)) * up
    store_tile(out, None, None, out_ptr, offs_m, offs_n, M, N, stride_om)


@int4_swiglu.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True, by_target=BY_TARGET)
def int4_swiglu_triton(
    x: Tensor, gate: Int4, up: Int4, *, BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int
) -> Tensor:
    """Return silu(x · gateᵀ) · (x · upᵀ) [..., n]; raises Unsupported for dtypes and groups it does not serve."""
    check_int4_call("int4_swiglu", x, gate, up)
    rows, out = rows_and_output(x, gate.shape[0])
    (n, k), block_k = gate.shape, fit_block_k(BLOCK_K, gate)
    if out.numel():
        _int4_swiglu_kernel[grid(out, BLOCK_M, BLOCK_N)](
            rows,
            contiguous_tensors(gate),
            contiguous_tensors(up),
            out,
            len(rows),
            n,
            k,
            *rows.stride(),
            out.stride(0),
            GROUP_SIZE=gate.group_size,
            ROUNDING=rounding_mode(gate, scale_sums=BLOCK_M < 64),
            **target_flags(BLOCK_M, num_warps),
            MASK_N=n % 16 != 0,
            MASK_K=k % block_k != 0,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=block_k,
            num_warps=num_warps,
            num_stages=stages_for_group(num_stages, x, gate),
        )
    return out.view(*x.shape[:-1], n)
