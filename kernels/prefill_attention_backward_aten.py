"""The gradients of causal attention of whole sequences by torch's attention for CPUs, one sequence after the other.

The keys and values of a KV head are repeated for each of its n = h/g query heads, and their gradients added up.
"""

from itertools import pairwise

import torch
from torch import Tensor

from vila_triton.ops import prefill_attention_backward

from ._sdpa import attention_gradients, check_on_cpu


@prefill_attention_backward.impl("aten")
def prefill_attention_backward_aten(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_start_loc: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_q [s, h, d], grad_k and grad_v [s, g, d]) in q's dtype; raises Unsupported off the CPU."""
    check_on_cpu("prefill_attention_backward", q)
    queries_per_kv = q.shape[1] // k.shape[1]
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for start, end in pairwise(query_start_loc.tolist()):
        if start == end:
            continue
        grad, queries, keys, values, *results = (x[None, start:end] for x in (grad_out, q, k, v, out, lse))
        if queries_per_kv > 1:
            keys, values = (x.repeat_interleave(queries_per_kv, 2) for x in (keys, values))  # [1, s, h, d]
        found = attention_gradients(grad, queries, keys, values, *results, softmax_scale, is_causal=True)
        for total, (x,) in zip(grads, found):  # [s, h, d] -> those of the query heads, or of the KV heads
            total[start:end] = x.unflatten(1, (total.shape[1], -1)).sum(2) if total.shape != q.shape else x
    return grads
