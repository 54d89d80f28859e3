"""Graphs of decode steps that are kept: for how long, how many of them, and where there are none."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_decode_graphs import Answers, both, capturable, check_equal, gpu  # noqa: F401 (two are fixtures)

from bench import standin
from vila_triton.engine import decode_graphs
from vila_triton.engine.decode_graphs import DecodeSteps
from vila_triton.engine.decode_loop import DecodeLoop
from vila_triton.engine.decode_step import StepBuffers
from vila_triton.engine.sampling import SamplingParams

if standin.is_active():
    from bench.standin.counts import counting


def test_nothing_is_captured_or_replayed_under_autocast(gpu: Any) -> None:  # noqa: F811
    """Products in half precision are asked for in the middle of an answer, and then no more."""
    ours = Answers(gpu, 1, 24, eos_token_id=None).read(8)
    with counting() as counts, torch.autocast("cuda", torch.bfloat16):
        ours.read(4)
    assert not counts.captures and not counts.replays
    with counting() as counts:
        ours.read(4)
    assert not counts.captures and counts.replays == 4


def test_graphs_are_dropped_when_there_are_too_many(gpu: Any) -> None:  # noqa: F811
    """There are no more graphs than may be kept, however many ways of choosing were asked for."""
    ours, theirs = both(gpu, 1, 4, pages=8, eos_token_id=None)
    for answers in (ours, theirs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_graphs, "MOST_GRAPHS", 2)
            answers.read()
            for top_k in (3, 4, 5):
                answers.how |= {"do_sample": True, "seed": 1, "top_k": top_k}
                answers.read(tokens_of=answers.begin(1))
    assert len(ours.cache.decode_steps.graphs) == 2
    check_equal(ours, theirs)


def test_buffers_have_room_for_a_context_of_any_number_of_pages(gpu: Any) -> None:  # noqa: F811
    """Buffers have room for all sequences there can be, so that none replace them, and their graphs, later."""
    cache = gpu.new_cache(0)
    cfg = replace(gpu.vila_config.llm, max_position_embeddings=20 * cache.allocator.page_size)
    cache.add_pages(20)
    seq = cache.allocator.add_sequence()
    loop = DecodeLoop(gpu.params.llm, cfg, cache, {seq: [1]}, SamplingParams())
    steps = [loop._load(1) and cache.decode_steps, loop._load(20) and cache.decode_steps]
    assert steps[0] is steps[1]


def test_threads_capture_one_after_the_other(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Of two caches, whose locks do not know of each other."""
    inside, most = list[int](), list[int]()

    @contextmanager
    def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    threads = [
        threading.Thread(target=DecodeSteps(StepBuffers.empty(1, 1, 4, gpu.device))._capture, args=(lambda: None,))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
