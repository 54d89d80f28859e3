"""The gradients of `prefill_attention` of whole sequences, of which nothing is cached."""
# pyright: reportInvalidTypeForm=false

from itertools import pairwise

import torch
from torch import Tensor

from vila_triton.registry import IntRange, OneOf, op

from .attention import HEAD_DIMS, causal_mask, check_heads
from .attention_backward import attention_gradients, check_lse
from .backward import NO_SECOND_DERIVATIVE, take_hard_cases
from .dtypes import DTYPES, dtype_name, random_tensor, upcast
from .indices import check_query_start_loc
from .prefill_attention import prefill_attention, without_context
from .shapes import check_axes, check_dtype, check_finite, check_floating, check_same_dtype


@op
def prefill_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_start_loc: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `prefill_attention` of sequences without a cached context, see `attention_gradients`.

    out and lse: what it returned with `return_lse`. grad_out, q and out [s, h, d], k and v [s, g, d], lse [s, h]
    float32, query_start_loc [b+1] int32 as in `RaggedBatch` -> (grad_q, grad_k, grad_v), shaped as q, k and v.

    Raises ValueError for shapes, dtypes or devices that do not fit, IndexError for rows that do not exist.
    """
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    starts = query_start_loc.tolist()
    for start, end in pairwise(starts):
        rows, mask = slice(start, end), causal_mask(end - start, end - start, q.device)
        sequence = grad_out[rows], q[rows], k[rows], v[rows], out[rows], lse[rows]
        for grad, x in zip(grads, attention_gradients(*sequence, softmax_scale, mask)):
            grad[rows] = x
    return grads


prefill_attention_backward.no_gradient(NO_SECOND_DERIVATIVE)


_KEPT = "q k v cache batch out lse"


@prefill_attention.gradient(q=_KEPT, k=_KEPT, v=_KEPT)
def _(grad, needs, q, k, v, cache, batch, softmax_scale, numerics, return_lse, out, lse):
    if cache.block_table.shape[1]:
        raise RuntimeError(
            "prefill_attention: keys and values that are read from pages have no gradient, "
            "expected a cache whose block_table has no columns where q, k or v require one"
        )
    return prefill_attention_backward(grad, q, k, v, out, lse, batch.query_start_loc, softmax_scale)


@prefill_attention_backward.requires
def _(grad_out, q, k, v, out, lse, query_start_loc, softmax_scale) -> None:
    name = "prefill_attention_backward"
    sizes = check_axes(
        name,
        grad_out=(grad_out, "s h d"),
        q=(q, "s h d"),
        k=(k, "s g d"),
        v=(v, "s g d"),
        out=(out, "s h d"),
        lse=(lse, "s h"),
        query_start_loc=(query_start_loc, "b+1"),
    )
    check_floating(name, q=q)
    check_same_dtype(name, q=q, k=k, v=v, out=out, grad_out=grad_out)
    check_lse(name, q, lse)
    check_dtype(name, torch.int32, query_start_loc=query_start_loc)
    check_finite(name, softmax_scale=softmax_scale)
    check_heads(name, sizes)
    if not sizes["b+1"]:
        raise ValueError(f"{name}: query_start_loc is empty, expected one entry more than there are sequences")


@prefill_attention_backward.bounds
def _(grad_out, q, k, v, out, lse, query_start_loc, softmax_scale) -> None:
    check_query_start_loc("prefill_attention_backward", query_start_loc, len(q))


def _split(args: tuple) -> tuple[Tensor, tuple]:
    grad_out, q, k, v, _, _, query_start_loc, softmax_scale = args
    return grad_out, (q, k, v, *without_context(k, query_start_loc), softmax_scale)


def _join(grad_out: Tensor, forward_args: tuple) -> tuple:
    q, k, v, cache, batch, softmax_scale = forward_args
    if q.device.type == "meta":  # the reference reads where sequences start
        out, lse = q.new_empty(q.shape), upcast(q.new_empty(q.shape[:2]))
    else:
        out, lse = prefill_attention.reference(q, k, v, cache, batch, softmax_scale, return_lse=True)
    return grad_out, q, k, v, out, lse, batch.query_start_loc, softmax_scale


@prefill_attention_backward.example_inputs
def _(
    b: IntRange(1, 3),
    s: IntRange(1, 40),
    g: IntRange(1, 2),
    ratio: OneOf(1, 2, 3, 4),
    d: HEAD_DIMS,
    dtype: DTYPES,
    *,
    rng: torch.Generator,
    device: str,
):
    """The first sequence has s tokens; the others fewer, none included."""
    lens = [s, *torch.randint(0, s + 1, (b - 1,), generator=rng).tolist()]
    query_start_loc = torch.tensor([0, *lens]).cumsum(0).to(device, torch.int32)
    heads = (g * ratio, g, g, g * ratio)
    q, k, v, grad_out = (random_tensor(sum(lens), h, d, dtype=dtype, rng=rng, device=device) for h in heads)
    return _join(grad_out, (q, k, v, *without_context(k, query_start_loc), d**-0.5))


take_hard_cases(prefill_attention_backward, prefill_attention, _split, _join)


@prefill_attention_backward.fake_impl
def _(grad_out, q, k, v, out, lse, query_start_loc, softmax_scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@prefill_attention_backward.sizes_from_args("b", "s")
def _(grad_out, q, k, v, out, lse, query_start_loc, softmax_scale):
    """The lengths lie on the device, so s is their mean."""
    (_, h, d), g, b = q.shape, k.shape[1], len(query_start_loc) - 1
    return dict(b=b, s=-(-len(q) // max(b, 1)), g=g, ratio=h // g, d=d, dtype=dtype_name(q.dtype))


@prefill_attention_backward.flops_and_bytes
def _(b, s, g, ratio, d, dtype):
    """Every sequence is counted as long as the first."""
    moved = (4 * ratio + 4) * d * getattr(torch, dtype).itemsize + 4 * ratio
    return 10 * b * g * ratio * d * (s * (s + 1) // 2), b * s * g * moved
