"""The predicted time of a launch on a GPU: bounds by its bytes, its instructions and the latency of memory.

A launch has two latencies of memory, for its first load and behind its last, and waves of programs in between, as many
at a time as registers, shared memory and warps allow. A wave takes the longest of

    memory   its share of the bytes that any kernel must move, at the bandwidth that kernels which only read get
    L2       all bytes that its programs load, at the rate of the L2 cache
    flight   either of them at the rate of the bytes in flight per latency
    issue    the instructions of its warps, one a clock and scheduler, of which a multiprocessor has four

Behind each launch lies the gap to the next kernel of a graph. The figures of the GPUs and of the gap are those of
configs/bench/token_times.toml, none of which was fitted to a kernel of this repository: `errors` compares what they
predict with what others have measured, and says by how much the bounds are too low.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vila_triton.paths import config_dir

from ..tuner.cost_model import known_gpus

SCHEDULERS = 4  # of a multiprocessor, each issues one instruction of a warp a clock (CUDA C++ programming guide)


@dataclass(frozen=True)
class Gpu:
    """A GPU in figures: `read` is the bandwidth that a kernel which only reads gets, `latency` in seconds."""

    name: str
    arch: str
    sms: int
    bandwidth: float
    read: float
    l2: float
    latency: float
    clock: float


@dataclass(frozen=True)
class Work:
    """The work of one launch. least_bytes: those that any kernel must move; loaded_bytes: what its programs load,
    in_flight of them at a time and program, None if not known; issued: instructions of warps; per_sm: programs at once.
    """

    programs: int
    least_bytes: float
    loaded_bytes: float = 0
    in_flight: float | None = None
    issued: float = 0
    warps: int = 4
    per_sm: int = 1


@dataclass(frozen=True)
class Prediction:
    """Seconds of a launch, and what its largest part is: "memory", "L2", "flight", "issue" or "latency"."""

    seconds: float
    limit: str


@lru_cache
def times_config() -> Mapping[str, Any]:
    """Returns configs/bench/token_times.toml."""
    return tomllib.loads((config_dir() / "bench" / "token_times.toml").read_text())


def gap() -> float:
    """Returns the seconds from the end of a kernel to the start of the next in a graph."""
    return times_config()["gap"]


def known_names() -> list[str]:
    """Returns the names of the GPUs whose times can be predicted."""
    return [name for name, value in times_config().items() if isinstance(value, dict)]


def gpu(name: str) -> Gpu:
    """Returns a GPU by its name. Errors: ValueError naming those there are."""
    if name not in known_names():
        raise ValueError(f"no GPU {name!r}; there are: {', '.join(known_names())}")
    chip, times = known_gpus()[name], times_config()[name]
    read, latency = times["read"] * chip.bandwidth, times["latency"] / times["clock"]
    return Gpu(name, chip.arch, chip.sms, chip.bandwidth, read, times["l2"], latency, times["clock"])


def wave_bounds(work: Work, programs: int, on: Gpu) -> dict[str, float]:
    """Returns the seconds that each bound allows a wave of so many programs."""
    share = programs / work.programs
    busy = min(SCHEDULERS * on.sms, programs * work.warps)
    bounds = {
        "memory": share * work.least_bytes / on.read,
        "L2": share * work.loaded_bytes / on.l2,
        "issue": share * work.issued / (busy * on.clock),
    }
    if work.in_flight:
        bounds["flight"] = share * max(work.least_bytes, work.loaded_bytes) * on.latency / (programs * work.in_flight)
    return bounds


def predict(work: Work, on: Gpu) -> Prediction:
    """Returns the predicted time of a launch, without the gap behind it."""
    full_waves, rest = divmod(work.programs, on.sms * work.per_sm)
    parts: dict[str, float] = {"latency": 2 * on.latency}
    for count, programs in ((full_waves, on.sms * work.per_sm), (1, rest)):
        if count and programs:
            bounds = wave_bounds(work, programs, on)
            limit = max(bounds, key=lambda name: bounds[name])
            parts[limit] = parts.get(limit, 0) + count * bounds[limit]
    return Prediction(sum(parts.values()), max(parts, key=lambda name: parts[name]))


def errors() -> Iterator[tuple[Mapping[str, Any], float, float]]:
    """Yields for each published measurement its row, the predicted value and by how much that differs, as a share of
    what was measured. Values are seconds of a kernel, or bytes a second.
    """
    for row in times_config()["published"]:
        on = gpu(row["gpu"])
        if "rate" in row:
            yield row, on.read, on.read / row["rate"] - 1
        else:
            work = Work(row["programs"], row["bytes"], row["bytes"], row["in_flight"])
            seconds = predict(work, on).seconds
            yield row, seconds, seconds / row["seconds"] - 1
