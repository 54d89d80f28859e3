"""The gradients of `encoder_attention`."""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import IntRange, op

from .attention import HEAD_DIMS
from .attention_backward import attention_gradients, check_lse
from .backward import NO_SECOND_DERIVATIVE, take_hard_cases
from .dtypes import DTYPES, dtype_name, random_tensor
from .encoder_attention import encoder_attention
from .shapes import check_axes, check_finite, check_floating, check_same_dtype


@op
def encoder_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `encoder_attention(q, k, v, softmax_scale)`, see `attention_gradients`.

    out and lse: what it returned with `return_lse`. grad_out, q, k, v and out [b, s, h, d], lse [b, s, h] float32 ->
    (grad_q, grad_k, grad_v), [b, s, h, d] each.
    """
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for i in range(len(q)):
        for grad, x in zip(grads, attention_gradients(grad_out[i], q[i], k[i], v[i], out[i], lse[i], softmax_scale)):
            grad[i] = x
    return grads


encoder_attention_backward.no_gradient(NO_SECOND_DERIVATIVE)


@encoder_attention.gradient(q="q k v out lse", k="q k v out lse", v="q k v out lse")
def _(grad, needs, q, k, v, softmax_scale, return_lse, out, lse):
    return encoder_attention_backward(grad, q, k, v, out, lse, softmax_scale)


@encoder_attention_backward.requires
def _(grad_out, q, k, v, out, lse, softmax_scale) -> None:
    heads = {"grad_out": grad_out, "q": q, "k": k, "v": v, "out": out}
    check_axes("encoder_attention_backward", **{name: (x, "b s h d") for name, x in heads.items()}, lse=(lse, "b s h"))
    check_floating("encoder_attention_backward", q=q)
    check_same_dtype("encoder_attention_backward", **{"q": q, **heads})
    check_lse("encoder_attention_backward", q, lse)
    check_finite("encoder_attention_backward", softmax_scale=softmax_scale)


def _split(args: tuple) -> tuple[Tensor, tuple]:
    grad_out, q, k, v, _, _, softmax_scale = args
    return grad_out, (q, k, v, softmax_scale)


def _join(grad_out: Tensor, forward_args: tuple) -> tuple:
    q, k, v, softmax_scale = forward_args
    out, lse = encoder_attention.reference(q, k, v, softmax_scale, return_lse=True)
    return grad_out, q, k, v, out.contiguous(), lse.contiguous(), softmax_scale  # as kernels return them


@encoder_attention_backward.example_inputs
def _(
    b: IntRange(1, 2),
    s: IntRange(1, 70),
    h: IntRange(1, 2),
    d: HEAD_DIMS,
    dtype: DTYPES,
    *,
    rng: torch.Generator,
    device: str,
):
    forward_args = encoder_attention.make_example(b, s, h, d, dtype, rng=rng, device=device)
    return _join(random_tensor(b, s, h, d, dtype=dtype, rng=rng, device=device), forward_args)


take_hard_cases(encoder_attention_backward, encoder_attention, _split, _join)


@encoder_attention_backward.fake_impl
def _(grad_out, q, k, v, out, lse, softmax_scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@encoder_attention_backward.sizes_from_args("b")
def _(grad_out, q, k, v, out, lse, softmax_scale):
    b, s, h, d = q.shape
    return dict(b=b, s=s, h=h, d=d, dtype=dtype_name(q.dtype))


@encoder_attention_backward.flops_and_bytes
def _(b, s, h, d, dtype):
    return 10 * b * h * d * s * s, b * s * h * (8 * d * getattr(torch, dtype).itemsize + 4)
