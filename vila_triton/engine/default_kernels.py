"""The kernels that a model runs with by default."""

from contextlib import AbstractContextManager

import torch

from ..registry import default_choices
from ..registry.tuned_tables import default_choices_for


def use_default_kernels(device: torch.device, phase: str = "prefill") -> AbstractContextManager[None]:
    """Let ops run the implementations that the configs choose for this device and phase.

    phase: "prefill", "decode" or "batch_invariant".
    Errors: ValueError if phase is "batch_invariant" and `use` chose an implementation that is not, of an op that has
    batch-invariant ones.
    """
    return default_choices(default_choices_for(device, phase), batch_invariant=phase == "batch_invariant")
