"""The side of a model that Hugging Face's `Trainer` and peft ask for when it is trained."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

REENTRANT = (
    "use_reentrant=True would run layers anew with other kernels than the forward pass had, and loses the gradients of "
    "a layer whose input needs none; pass use_reentrant=False"
)


class TrainingMixin:
    """Gradient checkpointing of every layer, and inputs that require gradients.

    Both flags are read by `forward`: `gradient_checkpointing` in training mode, where a gradient can be asked for.
    """

    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # `num_items_in_batch` of `forward`
    gradient_checkpointing = False
    inputs_require_grads = False

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep the input of a layer for the backward pass, and run the layer anew there.

        Errors: ValueError for `use_reentrant=True` and for whatever else is not as by default.
        """
        given = dict(activation_checkpointing_kwargs or {})
        if given.pop("use_reentrant", False):
            raise ValueError(REENTRANT)
        others = [f"{name}={value!r}" for name, value in given.items()]
        others += [f"every_n_layers={every_n_layers}"] * (every_n_layers != 1) + ["offload=True"] * bool(offload)
        if others:
            raise ValueError(f"gradient checkpointing takes use_reentrant=False alone, and not {', '.join(others)}")
        self.gradient_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Keep all that a backward pass needs."""
        self.gradient_checkpointing = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """`activation_checkpointing_enable` under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` under its older name."""
        self.activation_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Let the embeddings of a prompt require gradients, though all that they are made of is frozen."""
        self.inputs_require_grads = True

    def disable_input_require_grads(self) -> None:
        """Let the embeddings of a prompt require gradients if what they are made of does."""
        self.inputs_require_grads = False

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} is not replicated by torch.nn.DataParallel: show one GPU to the process "
            "(CUDA_VISIBLE_DEVICES=0), or start one process a GPU (torchrun)"
        )


def check_checkpointing(use_cache: bool, is_cached: bool) -> None:
    """Errors: ValueError where keys and values would be written to a cache, which layers that run anew would do again.

    is_cached: the arguments or the config name a cache, or need one.
    """
    if use_cache or is_cached:
        raise ValueError(
            "gradient checkpointing runs layers anew, which would write to the cache again: it needs use_cache=False, "
            "and none of past_key_values, start_pos, chunk_prefilling and batch_invariant numerics"
        )


def requiring_grads(embed: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, whose results require gradients where torch records any."""

    def embed_with_grads(row: Tensor) -> Tensor:
        x = embed(row)
        return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()

    return embed_with_grads
