"""configs/kernels.toml: the implementations that run by default, by device and phase."""

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ..console import note_new_spelling
from ..paths import config_dir
from .discovery import validate_choices
from .size_ranges import Choice

PHASES = ("prefill", "decode", "batch_invariant")  # the last: every phase, with batch-invariant numerics


@lru_cache
def configured_choices(device: str, phase: str | None, op_name: str | None = None) -> Mapping[str, Choice]:
    """The choices for a device type ("cpu", "cuda"): those of its section, replaced by those of [device.phase].

    phase: one of `PHASES`, or None for a call outside an engine: then only the device's own section holds.
    op_name: of one op only. A device that the file does not name runs references.
    Raises ValueError naming the file.
    """
    return read_kernels_toml(config_dir() / "kernels.toml", device, phase, op_name)


def read_kernels_toml(file: Path, device: str, phase: str | None, op_name: str | None = None) -> dict[str, Choice]:
    """Read the choices of `configured_choices` from a file; raises ValueError naming the file and the section."""
    try:
        table = tomllib.loads(file.read_text()).get(device, {})
        if "invariant" in table:
            note_new_spelling(f"[{device}.invariant] in {file.name}", f"[{device}.batch_invariant]")
            table["batch_invariant"] = table.pop("invariant")
        unknown = [name for name, value in table.items() if isinstance(value, dict) and name not in PHASES]
        if unknown:
            raise ValueError(
                f"{device}.{unknown[0]} is no section, expected {' or '.join(f'{device}.{phase}' for phase in PHASES)}"
            )
        choices = {op: value for op, value in {**table, **table.get(phase, {})}.items() if op not in PHASES}
        return validate_choices({op: value for op, value in choices.items() if op_name in (None, op)})
    except KeyError as error:
        hint = "one of a file of your own is known after --kernels PATH, in Python after discover(PATH)"
        raise ValueError(f"{file}, [{device}]: {error.args[0]}; {hint}") from None
    except ValueError as error:
        raise ValueError(f"{file}, [{device}]: {error.args[0]}") from None
