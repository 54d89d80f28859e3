"""The gradients of attention of whole images by torch's attention for CPUs, `..._flash_attention_for_cpu_backward`."""

from torch import Tensor

from vila_triton.ops import encoder_attention_backward

from ._sdpa import attention_gradients, check_on_cpu


@encoder_attention_backward.impl("aten")
def encoder_attention_backward_aten(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_q, grad_k, grad_v) [b, s, h, d] in q's dtype; raises Unsupported off the CPU."""
    check_on_cpu("encoder_attention_backward", q)
    grads = attention_gradients(grad_out, q, k, v, out, lse, softmax_scale, is_causal=False)
    grad_q, grad_k, grad_v = (x.to(q.dtype) for x in grads)
    return grad_q, grad_k, grad_v
