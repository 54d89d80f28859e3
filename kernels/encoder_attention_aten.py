"""softmax(q kᵀ · scale) v of whole images by torch's `scaled_dot_product_attention`: [b, s, h, d], any strides."""

import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import encoder_attention

from ._sdpa import attention_and_lse, check_not_meta, check_on_cpu, upcast_on_cpu


@encoder_attention.impl("aten")
def encoder_attention_aten(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention [b, s, h, d] in q's dtype, and with `return_lse`, on a CPU, its log-sum-exp [b, s, h]; raises
    Unsupported for that elsewhere, and for tensors on the meta device.
    """
    check_not_meta("encoder_attention", q)
    queries, keys, values = (upcast_on_cpu(x).transpose(1, 2) for x in (q, k, v))  # [b, h, s, d] each
    if return_lse:
        check_on_cpu("encoder_attention", q)
        out, lse = attention_and_lse(queries, keys, values, softmax_scale)
        return out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)
    return F.scaled_dot_product_attention(queries, keys, values, scale=softmax_scale).transpose(1, 2).to(q.dtype)
