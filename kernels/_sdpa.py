"""What the variants over torch's `scaled_dot_product_attention` share. It registers nothing."""

import torch
from torch import Tensor

from vila_triton.registry import Unsupported


def check_readable(op_name: str, x: Tensor) -> None:
    """Unsupported unless x lies where numbers can be read: these variants wait for lengths."""
    if x.device.type == "meta":
        raise Unsupported(f"{op_name}: tensors are on meta, where there is nothing to compute")


def upcast_on_cpu(x: Tensor) -> Tensor:
    """x in the dtype attention is quickest in: on a CPU, half precision is converted, which costs less than it does."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x
