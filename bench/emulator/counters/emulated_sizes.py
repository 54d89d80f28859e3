"""The sizes that an op is emulated at by default: configs/bench/emulate.toml's, else its representative sizes."""

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from vila_triton.paths import config_dir
from vila_triton.registry import Op

from ...measure.cases import size_combinations


@lru_cache
def emulate_config() -> Mapping[str, Any]:
    """Returns configs/bench/emulate.toml."""
    return tomllib.loads((config_dir() / "bench" / "emulate.toml").read_text())


def emulated_sizes(op: Op, impl: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the sizes of the calls that one config is emulated at; the first is what a single call takes.

    Errors: ValueError for a size that the op does not have.
    """
    op_table = emulate_config().get(op.name, {})
    impl_table = op_table.get("impl", {}).get(impl, {})
    calls = list(size_combinations({**op_table.get("sizes", {}), **impl_table.get("sizes", {})}, op))
    for sizes in calls if op_table else ():
        if "m" in sizes:
            sizes["m"] = max(sizes["m"], config.get("BLOCK_M", 1))
    return calls
