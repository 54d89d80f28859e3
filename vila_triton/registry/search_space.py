"""The search space of a kernel: the configs that are worth measuring, and the cost of one launch.

    SPACE = SearchSpace(
        {"BLOCK": [128, 1024], "num_warps": [1, 4], "num_stages": [1]},
        is_valid=lambda config, e, **_: config["BLOCK"] < 2 * e,  # else most lanes would be masked off
        launch_cost=lambda config, rows, e, **_: LaunchCost(rows, bytes=4 * e, bytes_per_stage=2 * config["BLOCK"]),
    )

A space is defined in its kernel's file, so that the hash of that file covers its functions too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

Config = Mapping[str, Any]
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class LaunchCost:
    """The number of programs of a launch, and the work of each of them; masked-off lanes count like the others.

    bytes            loaded and stored
    bytes_per_stage  loaded by one iteration of the program's loop; `num_stages` iterations are in flight at a time
    dot_flops        of its `tl.dot`s, which run on tensor cores
    elementwise_ops  all other operations, each on one element
    library_flops    of a library's matrix product that follows the launch, all of it, and `library_bytes` that it moves
    """

    programs: int
    bytes: int
    bytes_per_stage: int
    dot_flops: int = 0
    elementwise_ops: int = 0
    library_flops: int = 0
    library_bytes: int = 0


def accept_all(config: Config, **sizes: Any) -> bool:
    """Return True for any config at any sizes."""
    return True


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """Every combination of the axes for which `is_valid(config, **sizes)` holds; sizes are those of the op's domain.

    The cost model reads `launch_cost(config, **sizes)`; without it no config is pruned by cost.
    """

    axes: Mapping[str, Sequence[Any]]
    is_valid: Callable[..., bool] = accept_all
    launch_cost: Callable[..., LaunchCost] | None = None

    def configs(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The configs worth trying at these sizes, in the order of the axes."""
        candidates = (dict(zip(self.axes, values)) for values in product(*self.axes.values()))
        return [config for config in candidates if self.is_valid(config, **sizes)]


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up to an integer."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()
