"""Rotary position embedding (Su et al., RoFormer, 2021): pairs (x[i], x[i + d/2]) rotated by the angle of pair i.

    low, high -> low · cos - high · sin, high · cos + low · sin

One program takes BLOCK_H heads of one token, all their pairs at once. The heads of a token share its angles.

x [s, h, d], cos and sin [s, d/2], any strides; computed in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_triton.ops import rope
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, SearchSpace, cdiv, next_power_of_2

from ._heads import half_layout, load_cos_sin, load_heads, rotate, store_heads
from ._launch import check_supported

CONFIGS = [
    {"BLOCK_H": 8, "num_warps": 2, "num_stages": 1},
    {"BLOCK_H": 32, "num_warps": 4, "num_stages": 1},
]


def launch_cost(config: Config, s: int, h: int, r: int, dtype: str) -> LaunchCost:
    """Return the cost of rotating r pairs of each of h heads of s tokens."""
    heads = min(config["BLOCK_H"], h)
    read = 2 * heads * r * DTYPE_BYTES[dtype]
    padded_elements = 6 * config["BLOCK_H"] * next_power_of_2(r)
    return LaunchCost(
        programs=s * cdiv(h, config["BLOCK_H"]),
        bytes=2 * read + 8 * r,
        bytes_per_stage=read,
        elementwise_ops=padded_elements,
    )


SPACE = SearchSpace(
    {"BLOCK_H": [1, 2, 4, 8, 16, 32], "num_warps": [1, 2, 4, 8], "num_stages": [1]},
    is_valid=lambda config, h, **_: config["BLOCK_H"] <= next_power_of_2(h),
    launch_cost=launch_cost,
)


@triton.jit
def _rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    H,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_cs,
    stride_cr,
    stride_ss,
    stride_sr,
    stride_os,
    stride_oh,
    stride_od,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    blocks = tl.cdiv(H, BLOCK_H)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    offs_h = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    cos, sin = load_cos_sin(cos_ptr + token * stride_cs, sin_ptr + token * stride_ss, stride_cr, stride_sr, HEAD)
    x = load_heads(x_ptr, token * stride_xs + offs_h * stride_xh, mask_h, stride_xd, HEAD)
    store_heads(out_ptr, token * stride_os + offs_h * stride_oh, mask_h, stride_od, rotate(x, cos, sin), HEAD)


@rope.impl("triton", configs=CONFIGS, space=SPACE, batch_invariant=True)
def rope_triton(x: Tensor, cos: Tensor, sin: Tensor, *, BLOCK_H: int, num_warps: int, num_stages: int) -> Tensor:
    """Return x [s, h, d] rotated, in x's dtype; raises Unsupported for dtypes and devices it does not serve."""
    check_supported("rope", x, cos, sin)
    s, h, d = x.shape
    out = torch.empty(s, h, d, dtype=x.dtype, device=x.device)
    if out.numel():
        _rope_kernel[(s * triton.cdiv(h, BLOCK_H),)](
            x,
            cos,
            sin,
            out,
            h,
            *x.stride(),
            *cos.stride(),
            *sin.stride(),
            *out.stride(),
            HEAD=half_layout(d),
            BLOCK_H=BLOCK_H,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out
