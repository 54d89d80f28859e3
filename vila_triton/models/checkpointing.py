"""Gradient checkpointing (Chen et al. 2016): autograd keeps the input of a layer, and later runs the layer anew."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..registry import keep_choices


def keep_compiled_choices() -> Any:
    """`keep_choices` for compiled code, of which the number of its choices is a value: that is kept, not made anew."""
    return create_selective_checkpoint_contexts([torch.ops.vila_triton.current_choices.default])


def run_checkpointed(block: Callable[..., Any], *args: Any) -> Any:
    """Run a layer, of which autograd keeps the arguments alone."""
    context_fn = keep_compiled_choices if torch.compiler.is_compiling() else keep_choices
    return checkpoint(block, *args, use_reentrant=False, context_fn=context_fn)


def layer_runner(block: Callable[..., Any], checkpointing: bool) -> Callable[..., Any]:
    """The same function of a layer; with `checkpointing` autograd keeps its arguments alone and runs it anew in the
    backward pass, with the kernels, the random numbers and the autocast of the forward pass.
    """
    return (lambda *args: run_checkpointed(block, *args)) if checkpointing else block
