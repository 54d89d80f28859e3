"""The check, the dtype and the call that variants over torch's `scaled_dot_product_attention` share."""

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


def attention_and_lse(
    op_name: str, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v and the log-sum-exp of the scores: q, k and v [b, h, s, d] -> [b, h, s, d], [b, h, s].

    Raises Unsupported off the CPU, where torch's attention returns no log-sum-exp.
    """
    if q.device.type != "cpu":
        raise Unsupported(f"{op_name}: torch's attention does not return its log-sum-exp on {q.device}")
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *unit_strides(q, k, v), is_causal=is_causal, scale=softmax_scale
    )


def unit_strides(*tensors: Tensor) -> list[Tensor]:
    """The tensors [b, h, s, d], those copied whose last stride is not 1, which torch's attention for CPUs expects."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
