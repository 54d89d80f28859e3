"""Attention within a picture."""
# pyright: reportInvalidTypeForm=false

import torch
from einops import einsum
from torch import Tensor

from vila_triton.registry import Sizes, op

from .attention import HEAD_DIMS
from .dtypes import DTYPES, draw, name_of, wide
from .shapes import axes, finite, floating, same_dtype


@op
def encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of every position to every position of its picture: q, k and v [b, s, h, d] -> [b, s, h, d]."""
    scores = einsum(wide(q), wide(k), "b s h d, b t h d -> b h s t") * scale
    p = wide(scores.softmax(-1).to(v.dtype))
    return einsum(p, wide(v), "b h s t, b t h d -> b s h d").to(q.dtype)


@encoder_attention.requires
def _(q, k, v, scale) -> None:
    axes("encoder_attention", q=(q, "b s h d"), k=(k, "b s h d"), v=(v, "b s h d"))
    floating("encoder_attention", q=q)
    same_dtype("encoder_attention", q=q, k=k, v=v)
    finite("encoder_attention", scale=scale)


@encoder_attention.inputs
def _(
    b: Sizes(1, 3),
    s: Sizes(1, 90),
    h: Sizes(1, 3),
    d: HEAD_DIMS,
    dtype: DTYPES,
    *,
    rng: torch.Generator,
    device: str,
):
    q, k, v = (draw(b, s, h, d, dtype=dtype, rng=rng, device=device) for _ in range(3))
    return q, k, v, d**-0.5


encoder_attention.result(lambda q, k, v, scale: q.new_empty(q.shape))


@encoder_attention.sizes("b")
def _(q, k, v, scale):
    b, s, h, d = q.shape
    return dict(b=b, s=s, h=h, d=d, dtype=name_of(q.dtype))


@encoder_attention.costs
def _(b, s, h, d, dtype):
    return 4 * b * h * d * s * s, 4 * b * s * h * d * getattr(torch, dtype).itemsize
