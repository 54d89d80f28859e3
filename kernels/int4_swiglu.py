"""silu(x · gateᵀ) · (x · upᵀ) in one pass over x: each program keeps two sums, and writes one result.

A program multiplies BLOCK_N rows of both weights by BLOCK_M rows of x; see int4_matmul_splitk.py for how codes become
numbers. Scales multiply sums in blocks of 16 rows, else weights, which are then rounded as `Int4.order` says. Gate and
up are kept in float32 until they have been multiplied. k is not split: twice the rows of w fill a GPU sooner.

x [m, k], any strides; a row of x does not change the result of another.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import Int4, int4_swiglu
from vila_triton.registry.search_space import SearchSpace

from ._int4_dequant import (
    UNSCALED,
    check_group_size,
    contiguous_tensors,
    fit_block_k,
    lane_rows,
    rounding_mode,
    target_flags,
    word_pointers,
)
from ._int4_gemm import dequantize_block, is_promising, launch_cost, load_words, load_x
from ._launch import check_supported

CONFIGS = [
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
]
SPACE = SearchSpace(
    {
        "BLOCK_M": [16, 32, 64, 128],
        "BLOCK_N": [64, 128],
        "BLOCK_K": [64, 128],
        "num_warps": [4, 8],
        "num_stages": [1, 2, 3, 4],
    },
    lambda config, **sizes: is_promising({**config, "BLOCK_N": 2 * config["BLOCK_N"]}, **sizes),
    lambda config, **sizes: launch_cost({**config, "BLOCK_N": 2 * config["BLOCK_N"]}, **{**sizes, "n": 2 * sizes["n"]}),
)


@triton.jit(do_not_specialize_on_alignment=["M"])
def _int4_swiglu_kernel(
    x_ptr,
    gate_ptr,
    gate_scales_ptr,
    gate_zeros_ptr,
    up_ptr,
    up_scales_ptr,
    up_zeros_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_om,
    GROUP: tl.constexpr,
    ORDER: tl.constexpr,
    ASM: tl.constexpr,
    HIDE: tl.constexpr,
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
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    tile = (pid_n.to(tl.int64) * TILES_N + tl.arange(0, TILES_N))[:, None, None, None]
    tile_k = tl.arange(0, TILES_K)[None, :, None, None]
    lane = tl.arange(0, 32)[None, None, :, None]
    word = tl.arange(0, 4)[None, None, None, :]
    top, low = lane_rows(tile, lane // 4, N)
    gate_ptrs = word_pointers(gate_ptr, tile, tile_k, lane, word, N, K)
    up_ptrs = word_pointers(up_ptr, tile, tile_k, lane, word, N, K)
    # Rows past the end read row 0 and are not stored, which spares a mask in every load of the loop.
    x_ptrs = x_ptr + tl.where(offs_m < M, offs_m, 0)[None, :] * stride_xm + offs_k.to(tl.int64)[:, None] * stride_xk
    row = tl.where(offs_n < N, offs_n, 0)
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, K, BLOCK_K):
        gate_words = load_words(gate_ptrs, start, K, TILES_K, MASK_K)
        up_words = load_words(up_ptrs, start, K, TILES_K, MASK_K)
        x = load_x(x_ptrs, start, K, BLOCK_K, MASK_K)
        gate_w = dequantize_block(
            gate_words,
            gate_scales_ptr,
            gate_zeros_ptr,
            top,
            low,
            start,
            N,
            K,
            GROUP,
            ORDER,
            DTYPE,
            ASM,
            HIDE,
            TILES_N,
            TILES_K,
        )
        up_w = dequantize_block(
            up_words,
            up_scales_ptr,
            up_zeros_ptr,
            top,
            low,
            start,
            N,
            K,
            GROUP,
            ORDER,
            DTYPE,
            ASM,
            HIDE,
            TILES_N,
            TILES_K,
        )
        if ORDER == UNSCALED:
            group = tl.full([1], start // GROUP, tl.int64) * N
            gate_scale = tl.load(gate_scales_ptr + group + row).to(DTYPE).to(tl.float32)  # [BLOCK_N]
            up_scale = tl.load(up_scales_ptr + group + row).to(DTYPE).to(tl.float32)
            gate += tl.dot(gate_w, x, input_precision="ieee") * gate_scale[:, None]
            up += tl.dot(up_w, x, input_precision="ieee") * up_scale[:, None]
        else:
            gate = tl.dot(gate_w, x, gate, input_precision="ieee")
            up = tl.dot(up_w, x, up, input_precision="ieee")
        gate_ptrs += TILES_K * 128
        up_ptrs += TILES_K * 128
        x_ptrs += tl.full([1, 1], BLOCK_K, tl.int64) * stride_xk
    out = gate / (1.0 + tl.exp(-gate)) * up
    out_ptr += offs_m[None, :] * stride_om + offs_n[:, None]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


@int4_swiglu.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def int4_swiglu_triton(
    x: Tensor, gate: Int4, up: Int4, *, BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int
) -> Tensor:
    check_supported("int4_swiglu", x, gate.scales, gate.zeros, up.scales, up.zeros)
    check_group_size("int4_swiglu", gate)
    (n, k), rows = gate.shape, x.reshape(-1, x.shape[-1])  # [m, k]
    m, block = len(rows), fit_block_k(BLOCK_K, gate)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel():
        _int4_swiglu_kernel[(triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N),)](
            rows,
            *contiguous_tensors(gate),
            *contiguous_tensors(up),
            out,
            m,
            n,
            k,
            *rows.stride(),
            out.stride(0),
            GROUP=gate.group_size,
            ORDER=rounding_mode(gate, scale_sums=BLOCK_M == 16),
            **target_flags(),
            MASK_K=k % block != 0,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=block,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out.view(*x.shape[:-1], n)
