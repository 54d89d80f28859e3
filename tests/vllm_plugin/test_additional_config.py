"""The choice of kernels by `additional_config`; no vLLM is needed."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vila_triton.ops import rms_norm
from vila_triton.registry import count_calls, use
from vila_triton.vllm_plugin import kernel_choices as module
from vila_triton.vllm_plugin.kernel_choices import kernel_choices
from vila_triton.vllm_plugin.worker import KernelCounts

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _choices_of_a_new_process() -> Iterator[None]:
    module._choices_of.cache_clear()
    yield
    module._choices_of.cache_clear()


def config(**options: Any) -> Any:
    """As much of vLLM's config as is read."""
    return SimpleNamespace(additional_config={"vila_triton": options, "theirs": {"unknown": 1}})


def normalize() -> None:
    rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)


def test_calls_run_what_was_chosen_and_are_counted() -> None:
    chosen = config(kernels={"rms_norm": "triton"})
    with kernel_choices(chosen).active(CPU, "decode"):
        normalize()
    with kernel_choices(chosen).active(CPU, "prefill"):
        normalize()
    normalize()
    worker = KernelCounts()
    worker.vllm_config = chosen
    assert worker.kernel_counts() == {"rms_norm=triton": 2}
    worker.vllm_config = config()
    assert worker.kernel_counts() == {}


def test_without_a_choice_the_configs_decide_by_phase() -> None:
    choices = kernel_choices(config())
    with choices.active(CPU, "decode"):
        normalize()
    with choices.active(CPU, "batch_invariant"):
        normalize()
    assert choices.counts == {("rms_norm", "reference"): 1, ("rms_norm", "rowwise"): 1}


def test_choices_around_the_engine_have_no_effect_and_hold_again_behind_it() -> None:
    with use(rms_norm="triton"), count_calls() as counts:
        with kernel_choices(config()).active(CPU, "prefill"):
            normalize()
        normalize()
    assert counts == {("rms_norm", "triton"): 1}
    assert kernel_choices(config()).counts == {("rms_norm", "reference"): 1}


def test_another_thread_runs_the_same() -> None:
    choices = kernel_choices(config(kernels={"rms_norm": "triton"}))

    def run() -> None:
        with choices.active(CPU, "prefill"):
            normalize()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert choices.counts == {("rms_norm", "triton"): 1}


def test_kernels_of_ones_own_are_found(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from vila_triton.ops import rms_norm\n\n\n"
        '@rms_norm.impl("of_a_path")\n'
        "def mine(x, weight, eps):\n    return rms_norm.reference(x, weight, eps)\n"
    )
    choices = kernel_choices(config(kernels={"rms_norm": "of_a_path"}, kernel_paths=[str(file)]))
    with choices.active(CPU, "prefill"):
        normalize()
    del rms_norm.impls["of_a_path"]
    assert choices.counts == {("rms_norm", "of_a_path"): 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": {}}, r"no option 'kernel'; there are: kernels, kernel_paths"),
        ({"kernels": ["rms_norm"]}, r"\['kernels'\] is \['rms_norm'\], expected {op: implementation}"),
        ({"kernel_paths": "mine.py"}, r"\['kernel_paths'\] is 'mine.py', expected a list of files and folders"),
        ({"kernels": {"norm": "triton"}}, r"\['kernels'\]: no op 'norm'; there are: decode_attention, "),
        ({"kernels": {"rms_norm": "fast"}}, r"'rms_norm' has no implementation 'fast'; there are: reference, "),
        ({"kernels": {"rms_norm": 3}}, r"\['kernels'\]: op 'rms_norm': "),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_choices(config(**options))


def test_options_are_a_table() -> None:
    wrong: Any = SimpleNamespace(additional_config={"vila_triton": "kernels"})
    with pytest.raises(ValueError, match="is 'kernels', expected a table with kernels and kernel_paths"):
        kernel_choices(wrong)


def test_what_is_not_batch_invariant_is_refused_where_that_is_asked_for() -> None:
    choices = kernel_choices(config(kernels={"prefill_attention": "aten"}))
    with pytest.raises(ValueError, match="aten is not allowed with batch-invariant numerics"):
        choices.active(CPU, "batch_invariant")
