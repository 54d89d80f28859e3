"""The sizes that an op is compiled for by default: those of configs/bench/inspect.toml, else its
representative sizes.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vila_triton.paths import config_dir
from vila_triton.registry import Op

from ..measure.cases import size_combinations


@dataclass(frozen=True)
class CompileSpec:
    """The sizes to compile a config for, the bytes of weights that one load of a thread brings on NVIDIA according to
    the kernel's documentation, and the peer whose kernel is shown beside it.
    """

    sizes: Mapping[str, Any]
    weight_load_bytes: int | None = None
    peer: str | None = None


@lru_cache
def inspect_config() -> Mapping[str, Any]:
    """Returns configs/bench/inspect.toml."""
    return tomllib.loads((config_dir() / "bench" / "inspect.toml").read_text())


def compile_spec(op: Op, impl: str, config: Mapping[str, Any]) -> CompileSpec:
    """Returns the sizes and documented figures of one config. Errors: ValueError for a size that the
    op does not have.
    """
    op_table = inspect_config().get(op.name, {})
    impl_table = op_table.get("impl", {}).get(impl, {})
    sizes = dict(next(size_combinations({**op_table.get("sizes", {}), **impl_table.get("sizes", {})}, op)))
    if op_table and "m" in sizes:
        sizes["m"] = max(sizes["m"], config.get("BLOCK_M", 1))
    return CompileSpec(sizes, impl_table.get("weights", op_table.get("weights")), op_table.get("beside"))
