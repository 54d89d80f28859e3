"""softmax(q kᵀ · scale) v by torch's `scaled_dot_product_attention`, one sequence after the other.

The history is gathered out of its pages, as numbers where those are quantised, and laid before the new keys; head
dims, ratios and dtypes are as torch takes them. Query heads are g runs of n, and the keys of a run are repeated by a
stride of 0, not copied.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import Pages, prefill_attention
from vila_triton.ops.attention import causal
from vila_triton.ops.kv_write import gather
from vila_triton.registry import Unsupported

from ._sdpa import check, quick


@prefill_attention.impl("aten")
def prefill_attention_aten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    block_table: Tensor,
    query_start: Tensor,
    history: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor:
    check("prefill_attention", q)
    if policy == "invariant":
        raise Unsupported("prefill_attention: torch's attention adds up in an order that changes with the chunks")
    if lse:
        raise Unsupported("prefill_attention: torch's attention does not return its log-sum-exp")
    g, n = k.shape[1], q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    starts = query_start.tolist()
    for i, t in enumerate(history.tolist()):
        rows = slice(starts[i], starts[i + 1])
        s = rows.stop - rows.start
        if not s:
            continue
        keys, values = k[rows], v[rows]
        if t:
            keys = torch.cat((gather(k_pages, block_table[i], t).to(k.dtype), keys))
            values = torch.cat((gather(v_pages, block_table[i], t).to(v.dtype), values))
        queries = quick(q[rows]).unflatten(1, (g, n)).permute(1, 2, 0, 3)  # [g, n, s, d]
        keys, values = (quick(x).transpose(0, 1)[:, None].expand(-1, n, -1, -1) for x in (keys, values))  # [g, n, t, d]
        # Without a history the mask is the usual triangle, which torch need not read.
        mask = causal(s, s + t, q.device) if t and s > 1 else None
        o = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=not t, scale=scale)
        out[rows] = o.permute(2, 0, 1, 3).flatten(1, 2)  # [g, n, s, d] -> [s, h, d]
    return out
