"""The gradients of attention, from its result and its log-sum-exp (Dao et al. 2022, FlashAttention)."""

import torch
from einops import einsum, rearrange
from torch import Tensor

from .attention import attention_scores
from .dtypes import upcast


def attention_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) of `masked_attention` of one sequence, in the dtypes of q, k and v.

    grad_out, q and out [s, h, d], k and v [t, g, d], lse [s, h], mask [s, t]. With P = exp(q kᵀ · scale - lse), the
    weights, and D = sum(grad_out · out) of each query:

        grad_v = Pᵀ grad_out      dS = P · (grad_out vᵀ - D)      grad_q = dS k · scale      grad_k = dSᵀ q · scale

    P and dS are rounded to the dtype of q before they are multiplied, as tensor cores take them. The gradients of a KV
    head are sums over its h/g query heads.
    """
    g = k.shape[1]
    queries, grads, outs = (rearrange(upcast(x), "s (g n) d -> s g n d", g=g) for x in (q, grad_out, out))
    weights = (attention_scores(q, k, softmax_scale, mask) - rearrange(lse, "s (g n) -> g n s 1", g=g)).exp()
    row_sums = rearrange((grads * outs).sum(-1, keepdim=True), "s g n 1 -> g n s 1")
    grad_weights = einsum(grads, upcast(v), "s g n d, t g d -> g n s t")
    grad_scores = upcast((weights * (grad_weights - row_sums)).to(q.dtype))
    grad_v = einsum(upcast(weights.to(q.dtype)), grads, "g n s t, s g n d -> t g d")
    grad_q = rearrange(einsum(grad_scores, upcast(k), "g n s t, t g d -> s g n d"), "s g n d -> s (g n) d")
    grad_k = einsum(grad_scores, queries, "g n s t, s g n d -> t g d")
    return (grad_q * softmax_scale).to(q.dtype), (grad_k * softmax_scale).to(k.dtype), grad_v.to(v.dtype)


def check_lse(op_name: str, q: Tensor, lse: Tensor) -> None:
    """Raise ValueError unless the log-sum-exp has the dtype in which attention returns it."""
    expected = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != expected:
        raise ValueError(f"{op_name}: lse is {lse.dtype}, expected {expected} for {q.dtype}")
