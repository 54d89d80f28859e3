"""The modules under Hugging Face's names: linear maps, such as peft adapts, what holds them and other parameters, and
embeddings for others to call.

The functional model calls none of them; it reads their parameters. Linear maps have a `forward` for those who do.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vila_triton import ops
from vila_triton.models.layers import Affine
from vila_triton.models.params import ParameterSpec
from vila_triton.ops import Int4


class Holder(nn.Module):
    """A module that holds others or parameters, as those of a norm or of the embeddings."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Errors: NotImplementedError."""
        raise NotImplementedError(
            "the model reads the parameters of this module and does not call it; nor may others, such as peft's prompt "
            "tuning: see `get_input_embeddings` for embeddings, and give the model inputs_embeds"
        )


class InputEmbeddings(nn.Embedding):
    """The token embeddings for those who call them: the model itself takes rows of the parameter, so that a hook, as of
    `neftune_noise_alpha` of `TrainingArguments`, would change nothing.
    """

    def __init__(self, weight: nn.Parameter):
        num_embeddings, embedding_dim = weight.shape
        super().__init__(num_embeddings, embedding_dim, device="meta")
        self.weight = weight

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "the model does not call its embeddings, so hooks of theirs (as of neftune_noise_alpha) would be left out; "
            "compute inputs_embeds, and give the model these"
        )

    register_forward_hook = register_forward_pre_hook = register_full_backward_hook = _refuse_hook
    register_full_backward_pre_hook = _refuse_hook


class FrozenInt4(Int4):
    """An int4 weight as the `weight` of a module, of which peft asks dtype and device.

    Whoever takes it for a dense one, as peft does to merge an adapter into it, is told why it is not.
    """

    @property
    def dtype(self) -> torch.dtype:
        """That of inputs and results, of which peft makes adapters."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.scales.device

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"an int4 weight has no {name}: it is not trained, and no adapter can begin with it or be merged into it "
            "(`vila-triton convert SOURCE TARGET --format dense` writes a dense model)"
        )


class Int4Linear(nn.Linear):
    """A linear map whose weight is int4 and frozen: codes, scales and zeros are not trained.

    It is a kind of `nn.Linear`, so that what adapts these adapts it: peft needs no other class for it.
    """

    def __init__(self, weight: Int4, bias: Tensor | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.group_size = weight.group_size
        self.rounding: Any = weight.rounding
        for name in ("qweight", "scales", "zeros"):
            self.register_parameter(name, nn.Parameter(getattr(weight, name), requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @property
    def weight(self) -> FrozenInt4:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight [n, k]."""
        return FrozenInt4(self.qweight, self.scales, self.zeros, self.group_size, self.rounding)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [..., k] -> [..., n]."""
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes and groups, as `print(model)` shows them."""
        return f"{super().extra_repr()}, group_size={self.group_size}"


def is_linear(specs: Any) -> bool:
    """Return True for the specs of a linear map, False for those of a norm or a convolution."""
    if not isinstance(specs, Affine):
        return False
    return isinstance(specs.weight, Int4) or len(specs.weight.shape) == 2


def linear_module(p: Affine) -> nn.Linear:
    """The module of a linear map, which holds its tensors."""
    if isinstance(p.weight, Int4):
        return Int4Linear(p.weight, p.bias)
    n, k = p.weight.shape
    module = nn.Linear(k, n, bias=p.bias is not None, device="meta")
    module.weight = nn.Parameter(p.weight)
    if p.bias is not None:
        module.bias = nn.Parameter(p.bias)
    return module


def name_of(specs: Affine) -> str:
    """The name of a linear map or a norm in the checkpoint, of which its tensors have theirs."""
    weight: ParameterSpec = specs.weight.qweight if isinstance(specs.weight, Int4) else specs.weight  # pyright: ignore
    return weight.key.rpartition(".")[0]
