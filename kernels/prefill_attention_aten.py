"""softmax(q kᵀ · scale) v by torch's `scaled_dot_product_attention`, one sequence after the other.

The context is gathered out of its pages, dequantized if need be, and laid before the new keys; head
dims, ratios and dtypes are as torch takes them. Query heads are g runs of n, and the keys of a run are repeated by a
stride of 0, not copied.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import PagedKV, RaggedBatch, prefill_attention
from vila_triton.ops.attention import causal_mask
from vila_triton.ops.dtypes import upcast
from vila_triton.registry import Unsupported

from ._sdpa import attention_and_lse, check_not_meta, check_on_cpu, upcast_on_cpu


@prefill_attention.impl("aten")
def prefill_attention_aten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedKV,
    batch: RaggedBatch,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention [s, h, d] in q's dtype, and with `return_lse`, on a CPU, its log-sum-exp [s, h];
    raises Unsupported for that elsewhere, and under "batch_invariant".
    """
    check_not_meta("prefill_attention", q)
    if numerics == "batch_invariant":
        raise Unsupported("prefill_attention: torch's attention adds up in an order that changes with the chunks")
    if return_lse:
        check_on_cpu("prefill_attention", q)
    g, queries_per_kv = k.shape[1], q.shape[1] // k.shape[1]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=upcast(q[:0]).dtype, device=q.device)
    offsets = batch.query_start_loc.tolist()
    for i, t in enumerate(batch.context_lens.tolist()):
        rows = slice(offsets[i], offsets[i + 1])
        s = rows.stop - rows.start
        if not s:
            continue
        keys, values = k[rows], v[rows]
        if t:
            cached_k, cached_v = cache.gather(i, t)
            keys = torch.cat((cached_k.to(k.dtype), keys))
            values = torch.cat((cached_v.to(v.dtype), values))
        queries = upcast_on_cpu(q[rows]).unflatten(1, (g, queries_per_kv)).permute(1, 2, 0, 3)  # [g, n, s, d]
        keys, values = (  # [g, n, t, d]
            upcast_on_cpu(x).transpose(0, 1)[:, None].expand(-1, queries_per_kv, -1, -1) for x in (keys, values)
        )
        # Without a context the mask is the usual triangle, which torch need not read.
        mask = causal_mask(s, s + t, q.device) if t and s > 1 else None
        if return_lse:
            seq_out, seq_lse = attention_and_lse(queries, keys, values, softmax_scale, mask, is_causal=not t)
            lse[rows] = seq_lse.permute(2, 0, 1).flatten(1)
        else:
            seq_out = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=not t, scale=softmax_scale)
        out[rows] = seq_out.permute(2, 0, 1, 3).flatten(1, 2)  # [g, n, s, d] -> [s, h, d]
    return (out, lse) if return_lse else out
