"""The check and the dtype that variants over torch's `scaled_dot_product_attention` share."""

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
