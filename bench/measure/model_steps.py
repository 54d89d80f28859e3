"""The steps that a whole model is timed at, and their timer: runners take turns, so that other load meets all alike."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..correctness.failure_report import refusal_reason, release_memory
from .peak_memory import PeakMemory
from .runners import Runner

PAUSE = 0.05  # seconds until the threads of another process no longer spin
QUESTION_TOKENS = 32  # tokens of a question in `stream`, as TinyChat counts


@dataclass(frozen=True)
class ModelStep:
    """`new_tokens` for each of `batch` sequences that have `cached_tokens`; kind: prefill, stream, decode or memory."""

    kind: str  # prefill | stream | decode | memory
    batch: int
    new_tokens: int
    cached_tokens: int

    @property
    def labels(self) -> dict[str, int]:
        """The fields of a row that tell the step."""
        if self.kind == "decode":
            return {"batch": self.batch, "context": self.cached_tokens + 1}
        return {
            "batch": self.batch,
            "prompt": self.new_tokens,
            **({"history": self.cached_tokens} if self.kind == "streaming" else {}),
        }

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{name} {n}" for name, n in self.labels.items())])


def plan_steps(
    prompts: Sequence[int], histories: Sequence[int], batches: Sequence[int], contexts: Sequence[int]
) -> Iterator[ModelStep]:
    """Yields the steps for some prompt lengths, cached lengths of a new question, batches and context lengths."""
    yield from (ModelStep("prefill", 1, n, 0) for n in prompts)
    yield from (ModelStep("streaming", 1, QUESTION_TOKENS, n) for n in histories)
    yield from (ModelStep("decode", b, 1, n - 1) for b in batches for n in contexts)
    yield from (ModelStep("memory", 1, n, 0) for n in prompts)


def random_tokens(runner: Runner, batch: int, count: int) -> torch.Tensor:
    """Returns random token ids [b, n], the same for every runner."""
    ids = torch.randint(0, runner.model.cfg.vocab_size, (batch, count), generator=torch.Generator().manual_seed(0))
    return ids.to(runner.model.p.norm.device)


def synchronized_time(device: torch.device) -> float:
    """Returns the time in seconds, once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class RepeatedStep:
    """One runner at one step, repeated. A prompt starts with an empty state each time, a question and a new token after
    the same cached tokens. `failure` is the reason why it does not go on.
    """

    def __init__(self, runner: Runner, step: ModelStep):
        self.runner, self.step = runner, step
        self.capacity = step.cached_tokens + step.new_tokens
        self.cached_ids, self.new_ids = random_tokens(runner, step.batch, self.capacity).split(
            [step.cached_tokens, step.new_tokens], 1
        )
        self.state: Any = None
        self.seconds: list[float] = []
        self.failure: str | None = None

    def prepare(self) -> None:
        """Fills the cache."""
        if self.step.cached_tokens:
            self.state = self.runner.start(self.step.batch, self.capacity)
            self.runner.step(self.state, self.cached_ids)

    def measure(self, device: torch.device) -> None:
        """Times the step once, and rolls the cache back."""
        if not self.step.cached_tokens:
            self.state = self.runner.start(self.step.batch, self.capacity)
        start = synchronized_time(device)
        self.runner.step(self.state, self.new_ids)
        seconds = synchronized_time(device) - start
        self.seconds.append(seconds if self.runner.own_seconds is None else self.runner.own_seconds)
        if self.step.cached_tokens:
            self.runner.truncate(self.state, self.step.cached_tokens)


@torch.inference_mode()
def time_runners(
    runners: Sequence[Runner], step: ModelStep, rounds: int, device: torch.device
) -> list[list[float] | str]:
    """Returns the seconds of every runner in every round, [runner][round], or the reason why it got none. The order of
    the runners alternates between rounds.
    """
    repeated_steps = [RepeatedStep(runner, step) for runner in runners]
    other_processes = any(runner.own_seconds is not None for runner in runners)
    for number in range(rounds + 2):
        for repeated in repeated_steps[:: -1 if number % 2 else 1]:
            if repeated.failure is None:
                if other_processes:
                    time.sleep(PAUSE)
                try:
                    repeated.measure(device) if number else repeated.prepare()
                except Exception as error:  # one may fail in any way; the others go on
                    repeated.failure = refusal_reason(error)
                if repeated.failure is not None:
                    repeated.state = None
                    release_memory(device)
    return [turns.failure or turns.seconds[1:] for turns in repeated_steps]  # in the first, kernels are compiled


@torch.inference_mode()
def try_peak_bytes(runner: Runner, step: ModelStep, device: torch.device) -> int | str:
    """Returns the peak bytes of a step beyond the weights, or the reason why it failed."""
    try:
        return peak_bytes(runner, step, device)
    except Exception as error:  # as in `times`
        reason = refusal_reason(error)
    release_memory(device)
    return reason


def peak_bytes(runner: Runner, step: ModelStep, device: torch.device) -> int:
    """Returns the peak bytes of a step, from an empty state, beyond the weights."""
    ids = random_tokens(runner, step.batch, step.new_tokens)
    if device.type == "cuda":
        runner.step(runner.start(step.batch, step.new_tokens), ids)  # compiles
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        runner.step(runner.start(step.batch, step.new_tokens), ids)
        return torch.cuda.max_memory_allocated(device) - allocated
    with PeakMemory([*runner.weights, ids]) as memory:
        runner.step(runner.start(step.batch, step.new_tokens), ids)
    return memory.peak_bytes
