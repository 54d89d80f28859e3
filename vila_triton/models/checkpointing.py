"""Gradient checkpointing (Chen et al. 2016): autograd keeps the input of a layer, and later runs the layer anew."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

from ..registry import keep_choices

Block = TypeVar("Block", bound=Callable)


def layer_runner(block: Block, checkpointing: bool) -> Block:
    """The same function of a layer; with `checkpointing` autograd keeps its arguments alone and runs it anew in the
    backward pass, with the kernels, the random numbers and the autocast of the forward pass.
    """
    if not checkpointing:
        return block
    return partial(checkpoint, block, use_reentrant=False, context_fn=keep_choices)  # pyright: ignore
