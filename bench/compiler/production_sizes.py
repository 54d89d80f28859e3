"""What an op is compiled for where nobody says: configs/bench/inspect.toml, else its representative sizes."""

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
    """Sizes to compile a config for, the bytes of weights a thread's load is documented to bring on NVIDIA, and the
    peer whose kernel is shown beside it.
    """

    sizes: Mapping[str, Any]
    weight_load_bytes: int | None = None
    peer: str | None = None


@lru_cache
def inspect_config() -> Mapping[str, Any]:
    return tomllib.loads((config_dir() / "bench" / "inspect.toml").read_text())


def compile_spec(op: Op, impl: str, config: Mapping[str, Any]) -> CompileSpec:
    """Of one config. Errors: ValueError for a size the op does not have."""
    op_table = inspect_config().get(op.name, {})
    impl_table = op_table.get("impl", {}).get(impl, {})
    sizes = dict(next(size_combinations({**op_table.get("sizes", {}), **impl_table.get("sizes", {})}, op)))
    if op_table and "m" in sizes:
        sizes["m"] = max(sizes["m"], config.get("BLOCK_M", 1))
    return CompileSpec(sizes, impl_table.get("weights", op_table.get("weights")), op_table.get("beside"))
