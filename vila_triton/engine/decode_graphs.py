"""The decode steps over one KV cache: their buffers and, on a GPU, the graphs that they were captured in.

A graph repeats the launches it was captured with, over the memory it was captured with. So it is kept by all that these
follow from, and dropped when the parameters or the pages are no longer where they were.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.indices import can_read_values
from ..registry import OPS, count_calls, explicit_choices
from ..registry.policy import CALL_COUNTER
from ..registry.size_ranges import implementation_names
from ..registry.tuned_tables import default_choices_for, gpu_name, load_table
from .decode_step import StepBuffers

MIN_PAGES = 16  # columns of the smallest block table
CAPTURING = threading.Lock()  # a capture begins by waiting for the device, which breaks any that is under way
MOST_GRAPHS = 128  # kept at a time: any top_k has its own


def power_of_two_from(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def row_bucket(n: int, device: torch.device) -> int:
    """The rows of a step of n sequences: on a GPU a power of two, so that few graphs serve all."""
    return power_of_two_from(n) if device.type == "cuda" else n


def page_bucket(n: int) -> int:
    """The columns of the block table of a step whose longest sequence has n pages."""
    return max(MIN_PAGES, power_of_two_from(n))


def chosen_kernels(device: torch.device, phase: str) -> Hashable:
    """Which implementations the ops of a step run, each of them itself and not its name alone."""
    choices = {**default_choices_for(device, phase), **explicit_choices()}
    return tuple(
        (op, choice, *(OPS[op].impls[name] for name in implementation_names(choice))) for op, choice in choices.items()
    )


@dataclass(frozen=True)
class CapturedStep:
    """A step as a graph, and the calls of ops that one replay of it makes."""

    graph: Any
    calls: Counter[tuple[str, str]]

    def replay(self) -> None:
        self.graph.replay()
        if (counter := CALL_COUNTER.get()) is not None:
            counter.update(self.calls)


class DecodeSteps:
    """The buffers that all decoding over one cache shares, and the graphs of its steps.

    Whoever holds the lock of the cache may run steps. `owner` is whose rows the buffers hold; another one loads its own
    first. A step runs as it is the first time, which also compiles its kernels, is captured the second time and
    replayed from then on. What cannot be captured, as it waits for the device, is said once and runs as it is.
    """

    def __init__(self, buffers: StepBuffers):
        self.buffers = buffers
        self.device = buffers.tokens.device
        self.owner: object = None
        self.captured_with: Any = None  # model and tuned table of all graphs
        self.graphs: dict[Hashable, CapturedStep | str] = {}  # or "ran" or "not captured"
        self.stream: Any = None  # where steps run first and are captured
        self.last_stream: Any = None
        self.pool: Any = None

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the cache begins without

    def follow_stream(self) -> None:
        """Let the current stream of a GPU wait for the one where the buffers were used last."""
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            if self.last_stream not in (None, current):
                current.wait_stream(self.last_stream)
            self.last_stream = current

    def run(self, step: Callable[[], None], shape: Hashable, model: Any, phase: str) -> None:
        """Run a step, or its graph.

        shape: all that the step depends on beside the model, the pages and the kernels that are chosen for its phase.
        model: its config, and where its parameters lie.
        """
        kind = self.device.type
        # Values of indices may be looked at; and autocast keeps cast weights that are gone when it ends.
        if kind != "cuda" or can_read_values(self.device) or torch.is_autocast_enabled(kind):
            return step()
        now = model, load_table(gpu_name(self.device) or "")
        if now != self.captured_with:
            self.graphs.clear()
            self.captured_with = now
        key = shape, chosen_kernels(self.device, phase)
        known = self.graphs.get(key)
        if known is None:
            if len(self.graphs) >= MOST_GRAPHS:
                self.graphs.clear()
            self._run_first(step)
            self.graphs[key] = "ran"
        elif known == "ran":
            self.graphs[key] = known = self._capture(step)
        if isinstance(known, CapturedStep):
            known.replay()
        elif known == "not captured":
            step()

    def _run_first(self, step: Callable[[], None]) -> None:
        """Run a step on the stream of captures, so that what it leaves for that stream lies outside of graphs."""
        if self.stream is None:
            self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def _capture(self, step: Callable[[], None]) -> CapturedStep | str:
        graph, capture = torch.cuda.CUDAGraph(), torch.cuda.graph
        try:
            with (
                CAPTURING,
                count_calls() as calls,
                capture(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                step()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"a decode step is not captured as a graph, and runs without: {reason}", stacklevel=2)
            return "not captured"
        return CapturedStep(graph, calls)
