"""Search spaces as data: which configs of a kernel are worth trying, and what one launch of it does on paper.

    SPACE = Space(
        {"BLOCK": [128, 1024], "num_warps": [1, 4], "num_stages": [1]},
        where=lambda config, e, **_: config["BLOCK"] < 2 * e,  # else most lanes would be masked off
        launch=lambda config, rows, e, **_: Launch(programs=rows, bytes=4 * e, stage=2 * config["BLOCK"]),
    )

stands in the kernel's own file, so that the hash of that file covers its functions too.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

Config = Mapping[str, Any]
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes


@dataclass(frozen=True)
class LaunchCost:
    """One launch: how many programs there are, and what each of them does. Masked-off lanes work as the others do.

    bytes   loaded and stored
    stage   of these, what one step of the program's loop loads; `num_stages` steps are under way at a time
    dots    flops of its `tl.dot`s: tensor cores
    lanes   operations on single elements beside them
    """

    programs: int
    bytes: int
    bytes_per_stage: int
    dot_flops: int = 0
    elementwise_ops: int = 0


def accept_all(config: Config, **sizes: Any) -> bool:
    return True


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """Every combination of the axes for which `where(config, **sizes)` holds; sizes are named as in the op's `inputs`.

    `launch(config, **sizes)` is what the cost model goes by; without it no config is pruned by cost.
    """

    axes: Mapping[str, Sequence[Any]]
    is_valid: Callable[..., bool] = accept_all
    launch_cost: Callable[..., LaunchCost] | None = None

    def configs(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The configs worth trying at these sizes, in the order of the axes."""
        candidates = (dict(zip(self.axes, values)) for values in product(*self.axes.values()))
        return [config for config in candidates if self.is_valid(config, **sizes)]


def short_hash(*parts: bytes) -> str:
    """Twelve hex digits that change with any of the parts."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def canonical_json(value: Any) -> str:
    """JSON in which equal values are equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()
