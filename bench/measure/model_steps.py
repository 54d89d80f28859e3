"""The steps a whole model is timed at, and how: runners take turns, so that what else runs meets all alike."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..correctness.failure_report import refusal, release
from ..prefill_memory import Peak
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


class Turns:
    """One runner at one step, again and again: a prompt starts with an empty state each time, a question and a new
    token after the same cached tokens. `failed` says why it does not go on.
    """

    def __init__(self, runner: Runner, step: Step):
        self.runner, self.step = runner, step
        self.room = step.history + step.new
        self.history, self.new = tokens(runner, step.batch, self.room).split([step.history, step.new], 1)
        self.state: Any = None
        self.seconds: list[float] = []
        self.failed: str | None = None

    def prepare(self) -> None:
        if self.step.history:
            self.state = self.runner.start(self.step.batch, self.room)
            self.runner.step(self.state, self.history)

    def take(self, device: torch.device) -> None:
        if not self.step.history:
            self.state = self.runner.start(self.step.batch, self.room)
        start = clock(device)
        self.runner.step(self.state, self.new)
        self.seconds.append(clock(device) - start)
        if self.step.history:
            self.runner.forget(self.state, self.step.history)


@torch.inference_mode()
def times(runners: Sequence[Runner], step: Step, rounds: int, device: torch.device) -> list[list[float] | str]:
    """Seconds of every runner in every round, [runner][round], or why it got none; the order turns every round."""
    all_turns = [Turns(runner, step) for runner in runners]
    for number in range(rounds + 2):
        for turns in all_turns[:: -1 if number % 2 else 1]:
            if turns.failed is None:
                try:
                    turns.take(device) if number else turns.prepare()
                except Exception as error:  # one may fail in any way; the others go on
                    turns.failed = refusal(error)
                if turns.failed is not None:
                    turns.state = None
                    release(device)
    return [turns.failed or turns.seconds[1:] for turns in all_turns]  # in the first, kernels are compiled


@torch.inference_mode()
def peak(runner: Runner, step: Step, device: torch.device) -> int | str:
    """The most bytes that a step from nothing takes beyond the weights, at any moment; or why it was not done."""
    try:
        return peak_bytes(runner, step, device)
    except Exception as error:  # as in `times`
        reason = refusal(error)
    release(device)
    return reason


def peak_bytes(runner: Runner, step: Step, device: torch.device) -> int:
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
