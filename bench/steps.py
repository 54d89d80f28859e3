"""The steps a whole model is timed at, and how: runners take turns, so that what else runs meets all alike."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .memory import Peak
from .runners import Runner

QUESTION = 32  # tokens of a question in `stream`, as TinyChat counts


@dataclass(frozen=True)
class Step:
    """`new` tokens for each of `batch` sequences with `history` cached ones."""

    what: str  # prefill | stream | decode | memory
    batch: int
    new: int
    history: int

    @property
    def about(self) -> dict[str, int]:
        """What a row says of it."""
        if self.what == "decode":
            return {"batch": self.batch, "context": self.history + 1}
        return {"batch": self.batch, "prompt": self.new, **({"history": self.history} if self.what == "stream" else {})}

    def __str__(self) -> str:
        return " ".join([self.what, *(f"{name} {n}" for name, n in self.about.items())])


def steps(
    prompts: Sequence[int], histories: Sequence[int], batches: Sequence[int], contexts: Sequence[int]
) -> Iterator[Step]:
    yield from (Step("prefill", 1, n, 0) for n in prompts)
    yield from (Step("stream", 1, QUESTION, n) for n in histories)
    yield from (Step("decode", b, 1, n - 1) for b in batches for n in contexts)
    yield from (Step("memory", 1, n, 0) for n in prompts)


def tokens(runner: Runner, batch: int, count: int) -> torch.Tensor:
    """Random ids [b, n], the same for every runner."""
    ids = torch.randint(0, runner.model.cfg.vocab_size, (batch, count), generator=torch.Generator().manual_seed(0))
    return ids.to(runner.model.p.norm.device)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def times(runners: Sequence[Runner], step: Step, rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of every runner in every round, [runner][round]; the order turns from round to round, one is not counted.

    A prompt starts with an empty state each time, a question and a new token after the same cached tokens.
    """
    room = step.history + step.new
    ids = [tokens(runner, step.batch, room).split([step.history, step.new], 1) for runner in runners]
    states: list[Any] = [None] * len(runners)
    for i, runner in enumerate(runners):
        if step.history:
            states[i] = runner.start(step.batch, room)
            runner.step(states[i], ids[i][0])
    found: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds + 1):
        for i in range(len(runners))[:: 1 if turn % 2 else -1]:
            if not step.history:
                states[i] = runners[i].start(step.batch, room)
            start = clock(device)
            runners[i].step(states[i], ids[i][1])
            seconds = clock(device) - start
            if step.history:
                runners[i].forget(states[i], step.history)
            if turn:
                found[i].append(seconds)
    return found


@torch.inference_mode()
def peak(runner: Runner, step: Step, device: torch.device) -> int:
    """The most bytes that a step from nothing takes beyond the weights, at any moment."""
    ids = tokens(runner, step.batch, step.new)
    if device.type == "cuda":
        runner.step(runner.start(step.batch, step.new), ids)  # compiles
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        runner.step(runner.start(step.batch, step.new), ids)
        return torch.cuda.max_memory_allocated(device) - before
    with Peak([*runner.held, ids]) as most:
        runner.step(runner.start(step.batch, step.new), ids)
    return most.peak
