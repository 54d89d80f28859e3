"""The launches of one decoded token as a GPU would be given them, and the time that Python takes for them.

The engine's step runs with the kernels of a GPU on tensors of the CPU, whose numbers do not matter: Triton's kernels
are compiled for the GPU and not launched (`no_launches`), and each operator of torch that computes counts as a launch.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.engine.decode_graphs import CapturedStep, DecodeSteps
from vila_triton.engine.decode_loop import DecodeLoop
from vila_triton.engine.decode_step import Choosing, StepBuffers, run_step
from vila_triton.engine.sampling import SamplingParams
from vila_triton.models import llama, params
from vila_triton.models.config import LlamaConfig
from vila_triton.models.side_by_side import joined_shape, split_storage
from vila_triton.ops import indices
from vila_triton.registry import OPS, REFERENCE, Op, discover, use
from vila_triton.registry.kernel_config import configured_choices
from vila_triton.registry.launch_plans import NEW_TENSORS, is_view

from .no_launches import DriverLaunch, without_launching

GREEDY = Choosing(samples=False, largest_top_k=0, uses_top_p=False, penalizes=False)
PAGE_SIZE = 16
NARROW = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Call:
    """A launch of a token. op and impl: the call of an op that it belongs to, of these sizes; "" for none. first: it is
    the first launch of that call. launch: None for an operator of torch, whose name is `kernel`.
    """

    op: str
    impl: str
    sizes: tuple[tuple[str, Any], ...]
    config: tuple[tuple[str, Any], ...]
    first: bool
    kernel: str
    launch: DriverLaunch | None


def empty_parameters(cfg: LlamaConfig, dtype: torch.dtype) -> llama.Llama:
    """Parameters whose memory nobody has written to, and which therefore take none until they are read."""
    specs = llama.param_specs(cfg, dtype)
    places: dict[str, torch.Tensor] = {}
    for parts, axis in llama.joined_leaves(specs):
        whole = torch.empty(joined_shape(parts, axis), dtype=parts[0].dtype)
        places.update(zip((spec.key for spec in parts), split_storage(whole, parts, axis), strict=True))
    return params.tree_map(
        lambda spec: places[spec.key] if spec.key in places else torch.empty(spec.shape, dtype=spec.dtype), specs
    )


class DecodeStep:
    """A step of the engine for `batch` rows that attend to `context` tokens each."""

    def __init__(self, cfg: LlamaConfig, dtype: torch.dtype, batch: int, context: int):
        pages = -(-context // PAGE_SIZE)
        self.cfg, self.p, self.pages = cfg, empty_parameters(cfg, dtype), pages
        self.cache = PagedKVCache(cfg, batch * pages, page_size=PAGE_SIZE, dtype=dtype)
        self.buffers = StepBuffers.empty(batch, pages, cfg.vocab_size, torch.device("cpu"))
        self.buffers.is_live.fill_(True)
        self.buffers.page_updates[:, 0] = pages  # the column of no sequence
        self.context = context

    def go_back(self) -> None:
        """Let the next step be at the same place as the first."""
        self.buffers.context_lens.fill_(self.context - 1)

    def run(self) -> None:
        """Run the step."""
        run_step(self.p, self.cfg, self.cache, self.buffers, self.pages, GREEDY)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, tensors of the CPU are given the kernels that configs/kernels.toml names for a GPU, and the checks that
    would wait for one are left out.
    """
    discover()
    choices: dict[str, Any] = dict.fromkeys(OPS, REFERENCE) | dict(configured_choices("cuda", "decode"))
    can_read_values = indices.can_read_values
    with ExitStack() as stack:
        gpu = torch.device("cuda")
        stack.enter_context(patch.object(indices, "can_read_values", lambda _: can_read_values(gpu)))
        stack.enter_context(use(**choices))
        stack.enter_context(torch.inference_mode())
        yield


class Watch(TorchDispatchMode):
    """Notes the launches of a step, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.open: list[tuple[Op, str, dict[str, Any], Any]] = []  # calls of ops that run, the innermost last
        self.last: object = None  # the call of an op that launched last

    def note(self, kernel: str, launch: DriverLaunch | None) -> None:
        """Add a launch to the innermost call of an op."""
        op, impl, sizes, config = self.open[-1] if self.open else (None, "", {}, {})
        is_first, self.last = op is not None and sizes is not self.last, sizes
        name = op.name if op else ""
        self.calls.append(Call(name, impl, tuple(sizes.items()), tuple(config.items()), is_first, kernel, launch))

    def launched(self, launch: DriverLaunch) -> None:
        """Note a launch that the driver was given."""
        self.note(launch.kernel, launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in NEW_TENSORS and not is_view(func):
            self.note(func.overloadpacket.__name__, None)
        return func(*args, **(kwargs or {}))


def launches(cfg: LlamaConfig, dtype: torch.dtype, batch: int, context: int, target: str) -> list[Call]:
    """Returns the launches of a token, of one layer after the other."""
    watch, run = Watch(), Op.run

    def watched(op: Op, *args: Any, **kwargs: Any) -> Any:
        impl, config, *_ = op.decide(args, kwargs)
        watch.open.append((op, impl.name, op.sizes_of(*args, **kwargs) if op.sizes_of else {}, config))
        try:
            return run(op, *args, **kwargs)
        finally:
            watch.open.pop()

    with as_on_a_gpu(), without_launching(target, watch.launched):
        step = DecodeStep(cfg, dtype, batch, context)
        with patch.object(Op, "run", watched):
            step.go_back()
            step.run()  # compiles
            step.go_back()
            watch.calls.clear()
            with watch:
                step.run()
    return watch.calls


class AlwaysCaptured(dict[Any, Any]):
    """Graphs of every step, which do nothing."""

    def get(self, key: Any, default: Any = None) -> CapturedStep:
        return CapturedStep(SimpleNamespace(replay=lambda: None), Counter())


def graph_seconds(cfg: LlamaConfig, context: int, rounds: int) -> float:
    """Returns the least time of this thread that the engine took for a token of one row besides the call that replays
    its graph, in so many rounds.
    """
    narrow = replace(cfg, **NARROW, vocab_size=512)
    seconds = []
    with as_on_a_gpu():
        p = empty_parameters(narrow, torch.bfloat16)
        cache = PagedKVCache(narrow, -(-(context + rounds) // PAGE_SIZE) + 1, page_size=PAGE_SIZE, dtype=torch.bfloat16)
        seq = cache.allocator.add_sequence()
        with cache.append_slots({seq: context}):
            pass
        loop = DecodeLoop(p, narrow, cache, {seq: [1]}, SamplingParams(max_new_tokens=rounds + 1))
        loop.choose_first(torch.zeros(1, narrow.hidden_size, dtype=torch.bfloat16)).read()
        cache.decode_steps.device, cache.decode_steps.graphs = torch.device("cuda"), AlwaysCaptured()
        with patch.object(DecodeSteps, "follow_stream", lambda _: None):
            for _ in range(rounds):
                start = time.thread_time()
                loop.step().read()
                seconds.append(time.thread_time() - start)
    return min(seconds)


def python_seconds(cfg: LlamaConfig, batch: int, context: int, target: str, rounds: int) -> float:
    """Returns the least time of this thread that a step took in so many rounds, after those in which kernels are
    compiled and planned. The model is narrow, so that torch's operators on the CPU take no longer than their launches.
    """
    narrow = replace(cfg, **NARROW, vocab_size=512)
    seconds = []
    with as_on_a_gpu(), without_launching(target):
        step = DecodeStep(narrow, torch.bfloat16, batch, context)
        for _ in range(rounds + 5):
            step.go_back()
            start = time.thread_time()
            step.run()
            seconds.append(time.thread_time() - start)
    return min(seconds[5:])
