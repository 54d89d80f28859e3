"""Attention of the vision tower: every position of an image to every position of it."""
# pyright: reportInvalidTypeForm=false

from functools import partial

import torch
from einops import einsum, rearrange
from torch import Tensor

from vila_triton.registry import IntRange, op

from .attention import HEAD_DIMS
from .attention_cases import CHANGES, Change, change_sequence
from .dtypes import DTYPES, dtype_name, random_tensor, upcast
from .shapes import check_axes, check_finite, check_floating, check_same_dtype


@op
def encoder_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · softmax_scale) v of every position of an image over all positions of it.

    q, k and v [b, s, h, d], b images of s positions; returns [b, s, h, d], and with `return_lse` also the log-sum-exp
    of the scores, [b, s, h] float32. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    scores = einsum(upcast(q), upcast(k), "b s h d, b t h d -> b h s t") * softmax_scale
    p = upcast(scores.softmax(-1).to(v.dtype))
    out = einsum(p, upcast(v), "b h s t, b t h d -> b s h d").to(q.dtype)
    return (out, rearrange(scores.logsumexp(-1), "b h s -> b s h")) if return_lse else out


@encoder_attention.requires
def _(q, k, v, softmax_scale, return_lse=False) -> None:
    check_axes("encoder_attention", q=(q, "b s h d"), k=(k, "b s h d"), v=(v, "b s h d"))
    check_floating("encoder_attention", q=q)
    check_same_dtype("encoder_attention", q=q, k=k, v=v)
    check_finite("encoder_attention", softmax_scale=softmax_scale)


@encoder_attention.example_inputs
def _(
    b: IntRange(1, 3),
    s: IntRange(1, 90),
    h: IntRange(1, 3),
    d: HEAD_DIMS,
    dtype: DTYPES,
    *,
    rng: torch.Generator,
    device: str,
):
    q, k, v = (random_tensor(b, s, h, d, dtype=dtype, rng=rng, device=device) for _ in range(3))
    return q, k, v, d**-0.5


def _change_images(change: Change, args: tuple, rng: torch.Generator) -> tuple:
    *tensors, softmax_scale = args
    images = [change_sequence(change, rng, *image) for image in zip(*tensors)]
    return *map(torch.stack, zip(*images)), softmax_scale


for _name, _change in CHANGES.items():
    encoder_attention.hard_case(_name)(partial(_change_images, _change))


@encoder_attention.fake_impl
def _(q, k, v, softmax_scale, return_lse):
    return (q.new_empty(q.shape), upcast(q.new_empty(q.shape[:3]))) if return_lse else q.new_empty(q.shape)


@encoder_attention.sizes_from_args("b")
def _(q, k, v, softmax_scale, return_lse=False):
    b, s, h, d = q.shape
    return dict(b=b, s=s, h=h, d=d, dtype=dtype_name(q.dtype))


@encoder_attention.flops_and_bytes
def _(b, s, h, d, dtype):
    return 4 * b * h * d * s * s, 4 * b * s * h * d * getattr(torch, dtype).itemsize
