"""The default config by target: which of an implementation's own configs an architecture runs.

    configs=CONFIGS, by_target={"sm_80": 1, "sm_90": [[8, 2], [64, 1], 3]}

A number is a position in `configs`. Ranges are written as in configs/kernels.toml, by the first of the op's dynamic
sizes: config 2 up to size 8, 1 up to 64, 3 beyond. A target that is not named runs `configs[0]`, which every GPU can
run; so do interpreted kernels.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any

ConfigNumber = int | Sequence[Any]  # a position in `configs`, or [[last size, position], ..., position]


def config_number(choice: ConfigNumber, size: int) -> int:
    """Return the position of the config that is chosen at a size."""
    if isinstance(choice, int):
        return choice
    *ranges, beyond = choice
    return next((number for last, number in ranges if size <= last), beyond)


def config_numbers(choice: ConfigNumber) -> list[int]:
    """Return the positions of all configs that a choice names, in the order of sizes."""
    return [choice] if isinstance(choice, int) else [*(number for _, number in choice[:-1]), choice[-1]]


def describe_choice(choice: ConfigNumber, size_name: str) -> str:
    """Describe a choice: "config 2 for m up to 8, 1 for m up to 64, 3 beyond"."""
    if isinstance(choice, int):
        return f"config {choice}"
    *ranges, beyond = choice
    return "config " + ", ".join(
        [*(f"{number} for {size_name} up to {last}" for last, number in ranges), f"{beyond} beyond"]
    )


def check_by_target(by_target: Mapping[str, ConfigNumber], num_configs: int, has_ranges: bool) -> None:
    """Raise ValueError naming a target that is none, a config that does not exist, or ranges that do not increase.

    has_ranges: the op has a dynamic size, so there may be ranges of it.
    """
    if not isinstance(by_target, Mapping):
        raise ValueError(f"by_target: {by_target!r} is none, expected configs by target, such as {{'sm_90': 1}}")
    for target, choice in by_target.items():
        if not re.fullmatch(r"sm_\d+|gfx\w+", target):
            raise ValueError(f"by_target: {target!r} is no target, expected one such as 'sm_90' or 'gfx942'")
        try:
            numbers = config_numbers(choice)
            ends = [] if isinstance(choice, int) else [0, *(last for last, _ in choice[:-1])]
            ordered = all(a < b for a, b in pairwise(ends)) and all(type(end) is int for end in ends)
        except (TypeError, ValueError, IndexError):
            raise ValueError(
                f"by_target: {choice!r} of {target} is none, expected a number or [[last size, number], ..., number]"
            ) from None
        if not isinstance(choice, int) and not has_ranges:
            raise ValueError(f"by_target: {target} has ranges, but no size of the op differs from call to call")
        if not ordered:
            raise ValueError(f"by_target: the ranges of {target} end at {ends[1:]}, expected increasing whole sizes")
        if bad := [number for number in numbers if number not in range(num_configs) or type(number) is bool]:
            raise ValueError(f"by_target: {target} names config {bad[0]!r}, there are {num_configs}, from 0")


def current_target() -> str | None:
    """Return the target that Triton compiles for here, as "sm_90"; None where kernels are interpreted or none run."""
    if triton().knobs.runtime.interpret:
        return None
    try:
        driver: Any = triton().runtime.driver.active
    except RuntimeError:  # there is no driver
        return None
    return target_of_device(driver, driver.get_current_device())


def driver_in_use() -> object:
    """Return the driver that Triton has now; None before it has one. A target is the same as long as it is."""
    return triton().runtime.driver._active


@cache
def triton() -> Any:
    """Triton, which listing ops does not need."""
    return import_module("triton")


@lru_cache
def target_of_device(driver: Any, device: int) -> str:
    """The target of a device of a driver, "sm_90" or "gfx942"; a device does not become another."""
    target: Any = driver.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
