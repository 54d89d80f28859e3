"""Threads leave the process as they found it, and what they share is changed by one at a time."""

import contextvars
import copy
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from hf_reference import build, pictures, words
from PIL import Image, ImageFile

from bench.correctness.error_budget import DEVICE
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.images.processing import open_image
from vila_triton.lock import DeferringLock, SharedContext
from vila_triton.ops import linear, rms_norm
from vila_triton.registry import count_calls, discover, explicit_choices, use

discover()
MODEL = build(dtype=torch.bfloat16, seed=2)
IMAGES = pictures(MODEL, 2)


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """The results of functions started at once, each in its own thread and a copy of this context."""
    ready, results = Barrier(len(jobs)), dict[int, Any]()

    def run(i: int) -> None:
        ready.wait()
        try:
            results[i] = jobs[i]()
        except Exception as error:
            results[i] = error

    threads = [Thread(target=contextvars.copy_context().run, args=(run, i)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(len(jobs))]


def settings() -> dict[str, Any]:
    """All that belongs to the process, or to whoever calls us, and that a library might change."""
    found: dict[str, Any] = {
        f"{name}.{key}": value
        for name, module in list(sys.modules.items())
        if name.startswith("torch.backends") and module
        for key in dir(module)
        if not key.startswith("_") and isinstance(value := getattr(module, key, None), bool | int | float | str)
    }
    for get in ("default_dtype", "num_threads", "num_interop_threads", "float32_matmul_precision"):
        found[get] = getattr(torch, f"get_{get}")()
    for get in ("grad_enabled", "inference_mode_enabled", "autocast_enabled"):
        found[get] = getattr(torch, f"is_{get}")()
    found["deterministic"] = torch.get_deterministic_debug_mode()
    found["random"] = random.getstate(), torch.get_rng_state().tolist(), repr(numpy.random.get_state())
    found["warnings"], found["environment"], found["folder"] = list(warnings.filters), dict(os.environ), os.getcwd()
    found["pillow"] = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    found["signals"] = [signal.getsignal(number) for number in signal.valid_signals()]
    found["system"] = sys.getrecursionlimit(), sys.getswitchinterval(), sys.stdout, sys.stderr, sys.excepthook
    return found


def test_threads_leave_global_settings_as_they_were(tmp_path: Path) -> None:
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")

    def work() -> None:
        for _ in range(2):
            MODEL.generate(words(2, 5), max_new_tokens=3)
            MODEL.generate(torch.tensor([[1, -200]]), IMAGES[:1], max_new_tokens=2, do_sample=True, seed=3)
            MODEL.generate(words(1, 5), max_new_tokens=2, loop="transformers")
            open_image(tmp_path / "a.png")
            with use(rms_norm="triton"):
                rms_norm(torch.ones(1, 8).to(DEVICE), torch.ones(8).to(DEVICE), 1e-5)

    work()  # what is imported late, and registers itself, does it here
    before = settings()
    assert in_threads([work] * 6) == [None] * 6
    after = settings()
    assert before.keys() == after.keys()
    assert not {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def overlapping(patch: pytest.MonkeyPatch, owner: Any, name: str, work: Callable[[], Any]) -> list[Any]:
    """The results of work in two threads, of which the first to call owner.name finishes first."""
    begun, ended, whole = [Event(), Event()], Event(), getattr(owner, name)

    def called(*args: Any) -> Any:
        first = not begun[0].is_set()
        begun[0 if first else 1].set()
        assert (begun[1] if first else ended).wait(9)
        return whole(*args)

    def run(first: bool) -> Any:
        assert first or begun[0].wait(9)
        try:
            return work()
        finally:
            ended.set()

    with patch.context() as meanwhile:
        meanwhile.setattr(owner, name, called)
        return in_threads([lambda: run(True), lambda: run(False)])


@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN, whose setting it is, multiplies on a CPU alone")
def test_single_row_in_two_threads_leaves_onednn_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)
    with use(linear="aten"):
        results = overlapping(monkeypatch, F, "linear", lambda: linear(x, w))
    assert all(torch.equal(y, F.linear(x, w)) for y in results), results
    assert torch.backends.mkldnn.enabled


def test_images_opened_in_two_threads_leave_warning_filters_as_they_were(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Image.new("RGB", (6, 5)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    results = overlapping(monkeypatch, Image, "open", lambda: open_image(tmp_path / "a.png").size)
    assert results == [(6, 5)] * 2 and warnings.filters == before


def test_shared_setting_is_changed_once_and_restored_by_the_last_thread() -> None:
    said: list[str] = []

    @contextmanager
    def changed() -> Any:
        said.append("changed")
        yield
        said.append("put back")

    setting = SharedContext(changed)
    setting.__enter__()
    with pytest.raises(ZeroDivisionError), setting:
        raise ZeroDivisionError
    assert said == ["changed"]
    setting.__exit__()
    assert said == ["changed", "put back"]
    with setting:
        assert said[2:] == ["changed"]


def test_interpreted_kernels_run_one_at_a_time() -> None:
    x, weight = torch.randn(6, 5, 24).to(DEVICE), torch.randn(24).to(DEVICE)
    with use(rms_norm="triton"):
        results = in_threads([lambda i=i: [rms_norm(x[i], weight, 1e-5) for _ in range(3)] for i in range(6)])
        expected = [rms_norm(one, weight, 1e-5) for one in x]
    for found, y in zip(results, expected):
        assert isinstance(found, list), found
        assert all(torch.equal(one, y) for one in found)


def test_kernel_choice_holds_in_threads_with_a_copy_of_the_context_only() -> None:
    with use(rms_norm="triton"):
        (copied,), plain = in_threads([lambda: dict(explicit_choices())]), list[Any]()
        thread = Thread(target=lambda: plain.append(dict(explicit_choices())))
        thread.start()
        thread.join()
    assert copied == {"rms_norm": "triton"} and plain == [{}]


def test_half_read_answer_leaves_the_context_unchanged() -> None:
    from vila_triton.engine import engine
    from vila_triton.engine.sampling import SamplingParams

    cache = MODEL.new_cache(1)
    cache.ensure_capacity({0: 9})
    answer = engine.generate_tokens(
        MODEL.params,
        {0: words(4)},
        MODEL.vila_config,
        cache,
        None,
        SamplingParams.from_generate_kwargs(1, max_new_tokens=4),
    )
    before = settings(), {var: value for var, value in contextvars.copy_context().items()}
    for context in (contextvars.copy_context(), contextvars.copy_context()):  # as servers do that read it in a pool
        context.run(next, answer)
    next(answer)
    assert before == (settings(), {var: value for var, value in contextvars.copy_context().items()})
    with count_calls() as calls:
        list(answer)
    assert calls


def test_deferred_job_runs_at_release_before_the_next_holder() -> None:
    lock, said = DeferringLock(), list[str]()
    with lock:
        lock.run_soon(lambda: said.append("left by a finalizer"))
        assert not said
    assert said == ["left by a finalizer"]
    lock.run_soon(lambda: said.append("at once"))
    assert said[1:] == ["at once"]
    lock._jobs.append(lambda: said.append("left at the last moment"))
    with lock:
        assert said[2:] == ["left at the last moment"]


def test_copied_cache_has_its_own_lock() -> None:
    cache = PagedKVCache(MODEL.vila_config.llm, 2)
    with cache.lock, copy.deepcopy(cache).lock:
        pass
