"""softmax(q kᵀ · scale) v of one new token a sequence by torch's `scaled_dot_product_attention`.

The n = h/g query heads of a key/value head stand where the tokens of a prompt would: one call a sequence, [g, n, d]
against [g, t, d], and no key is repeated. A call sees one sequence and its length alone, so it is "invariant" as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import Pages, decode_attention
from vila_triton.ops.kv_write import gather
from vila_triton.registry import Unsupported

from ._sdpa import check, quick


@decode_attention.impl("aten")
def decode_attention_aten(
    q: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor:
    check("decode_attention", q)
    if lse:
        raise Unsupported("decode_attention: torch's attention does not return its log-sum-exp")
    out = torch.zeros_like(q)
    for i, t in enumerate(lengths.tolist()):
        if not t:
            continue
        query = quick(q[i]).unflatten(0, (k_pages.shape[2], -1))  # [g, n, d]
        keys, values = (
            quick(gather(pages, block_table[i], t).to(q.dtype)).transpose(0, 1)  # [g, t, d]
            for pages in (k_pages, v_pages)
        )
        out[i] = F.scaled_dot_product_attention(query[None], keys[None], values[None], scale=scale)[0].flatten(0, 1)
    return out
