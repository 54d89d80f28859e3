"""The checks, the dtype and the calls that variants over torch's `scaled_dot_product_attention` share."""

import torch
from torch import Tensor

from vila_triton.registry import Unsupported


def check_not_meta(op_name: str, x: Tensor) -> None:
    """Unsupported for a meta tensor: attention over pages reads sequence lengths on the host, and there are none."""
    if x.device.type == "meta":
        raise Unsupported(f"{op_name}: tensors are on meta, where there is nothing to compute")


def upcast_on_cpu(x: Tensor) -> Tensor:
    """x in the dtype in which attention is fastest: on a CPU half precision becomes float32, which pays."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x


def check_on_cpu(op_name: str, x: Tensor) -> None:
    """Unsupported off the CPU, the only place where torch's attention takes and returns its log-sum-exp as ours."""
    if x.device.type != "cpu":
        raise Unsupported(
            f"{op_name}: torch's attention with its log-sum-exp runs on a CPU, but tensors are on {x.device}"
        )


def attention_and_lse(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v, and the log-sum-exp of the scores, on a CPU: q [b, h, s, d], k and v [b, h, t, d], mask
    [s, t] -> [b, h, s, d] in their dtype, [b, h, s].
    """
    bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *unit_strides(q, k, v), attn_mask=bias, is_causal=is_causal, scale=softmax_scale
    )


def attention_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v on a CPU, in the dtype of `upcast_on_cpu`; lse [b, s, h], all others [b, s, h, d]."""
    heads = unit_strides(*(upcast_on_cpu(x).transpose(1, 2) for x in (grad_out, q, k, v, out)))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads, lse.transpose(1, 2), 0.0, is_causal, scale=softmax_scale
    )
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
    return grad_q, grad_k, grad_v


def unit_strides(*tensors: Tensor) -> list[Tensor]:
    """The tensors, those copied whose last stride is not 1, which torch's attention for CPUs expects."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
