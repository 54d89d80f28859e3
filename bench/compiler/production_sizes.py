"""What an op is compiled for where nobody says: configs/bench/inspect.toml, else its representative sizes."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vila_triton.paths import config_dir
from vila_triton.registry import Op

from ..measure.cases import combinations


@dataclass(frozen=True)
class Production:
    """Sizes to compile a config for, the bytes of weights a thread's load is documented to bring on NVIDIA, and the
    peer whose kernel is shown beside it.
    """

    sizes: Mapping[str, Any]
    weights: int | None = None
    beside: str | None = None


@lru_cache
def table() -> Mapping[str, Any]:
    return tomllib.loads((config_dir() / "bench" / "inspect.toml").read_text())


def production(op: Op, impl: str, config: Mapping[str, Any]) -> Production:
    """Of one config. Errors: ValueError for a size the op does not have."""
    of_op = table().get(op.name, {})
    own = of_op.get("impl", {}).get(impl, {})
    sizes = dict(next(combinations({**of_op.get("sizes", {}), **own.get("sizes", {})}, op)))
    if of_op and "m" in sizes:
        sizes["m"] = max(sizes["m"], config.get("BLOCK_M", 1))
    return Production(sizes, own.get("weights", of_op.get("weights")), of_op.get("beside"))
