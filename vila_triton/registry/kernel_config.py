"""Which kernel runs by default: configs/kernels.toml, by device and phase or policy."""

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from ..paths import config_dir
from .registry import validate_choices
from .size_ranges import Choice

PHASES = ("prefill", "decode", "invariant")  # the last is every phase under that policy


@lru_cache
def configured_choices(device: str, phase: str | None, op_name: str | None = None) -> Mapping[str, Choice]:
    """The choices for a device type ("cpu", "cuda") and one of `PHASES`: those of [device], then of [device.phase]; of
    all ops, or of one. A device the file does not name runs references. Errors: ValueError naming the file.
    """
    return read_kernels_toml(config_dir() / "kernels.toml", device, phase, op_name)


def read_kernels_toml(file: Path, device: str, phase: str | None, op_name: str | None = None) -> dict[str, Choice]:
    try:
        table = tomllib.loads(file.read_text()).get(device, {})
        unknown = [name for name, value in table.items() if isinstance(value, dict) and name not in PHASES]
        if unknown:
            raise ValueError(
                f"{device}.{unknown[0]} is no section, expected {' or '.join(f'{device}.{phase}' for phase in PHASES)}"
            )
        choices = {op: value for op, value in {**table, **table.get(phase, {})}.items() if op not in PHASES}
        return validate_choices({op: value for op, value in choices.items() if op_name in (None, op)})
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}, [{device}]: {error.args[0]}") from None


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the GPU if there is one, or the CPU. Errors: ValueError for one that is not there."""
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cuda" and not has_gpu):
        raise ValueError(f"device {name!r} is not to be had here; there is cpu{' and cuda' if has_gpu else ''}")
    return device
