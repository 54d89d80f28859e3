"""Gradient checkpointing (Chen et al. 2016): autograd keeps the input of a layer, and later runs the layer anew."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..registry import keep_choices


def run_checkpointed(block: Callable[..., Any], *args: Any) -> Any:
    """Run a layer, of which autograd keeps the arguments alone."""
    if torch.compiler.is_compiling():  # compiled code runs its backward pass by the choices that hold there
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=keep_choices)


def layer_runner(block: Callable[..., Any], checkpointing: bool) -> Callable[..., Any]:
    """The same function of a layer; with `checkpointing` autograd keeps its arguments alone and runs it anew in the
    backward pass, with the kernels, the random numbers and the autocast of the forward pass.
    """
    return (lambda *args: run_checkpointed(block, *args)) if checkpointing else block
