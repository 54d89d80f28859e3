"""softmax(q kᵀ · scale) v of one new token a sequence by torch's `scaled_dot_product_attention`.

The n = h/g query heads of a KV head stand where the tokens of a prompt would: one call a sequence, [g, n, d] against
[g, t, d], and no key is repeated. A call sees one sequence and its length alone, so its bits depend on neither the
batch nor the pages, as the tests check on a CPU. It is not marked batch_invariant all the same: torch chooses among its
own implementations, and does not promise that the choice and the order of their sums stay the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import PagedKV, decode_attention
from vila_triton.registry import Unsupported

from ._sdpa import check_not_meta, upcast_on_cpu


@decode_attention.impl("aten")
def decode_attention_aten(
    q: Tensor,
    cache: PagedKV,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Return attention [b, h, d] in q's dtype; raises Unsupported if `return_lse` is set or q is on the meta device."""
    check_not_meta("decode_attention", q)
    if return_lse:
        raise Unsupported("decode_attention: torch's attention does not return its log-sum-exp")
    out = torch.zeros_like(q)
    for i, t in enumerate(seq_lens.tolist()):
        if not t:
            continue
        query = upcast_on_cpu(q[i]).unflatten(0, (cache.k_pages.shape[2], -1))[None]  # [1, g, n, d]
        k, v = (upcast_on_cpu(x.to(q.dtype)).transpose(0, 1)[None] for x in cache.gather(i, t))  # [1, g, t, d]
        out[i] = F.scaled_dot_product_attention(query, k, v, scale=softmax_scale)[0].flatten(0, 1)
    return out
