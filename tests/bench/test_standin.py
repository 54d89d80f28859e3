"""Tests for a GPU (`pytest -m gpu`) run on the stand-in for one, with compiled kernels that are emulated: those of the
selection that are named here.

Each checks every launch for what CUDA refuses (CPU tensors, tensors of two devices, waits inside a capture) and for
what no kernel may do.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime.jit import KernelInterface

from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import OPS, discover
from vila_triton.registry.interpreter import uses_triton_kernels
from vila_triton.tiny.examples import EXAMPLES_DIR

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = """
registry/test_custom_ops.py::test_a_decode_step_is_captured_in_a_cuda_graph[int4]
registry/test_custom_ops.py::test_a_decode_step_is_captured_in_a_cuda_graph[dense]
ops/test_kv_pages.py::test_kv_write_skips_negative_slots_and_reaches_pages_beyond_32_bits[int4-rope_kv_write]
ops/test_kv_pages.py::test_decode_reaches_pages_and_scales_beyond_32_bits[int8]
ops/test_kv_pages.py::test_decode_ignores_nan_beyond_the_sequence_length[int4]
kernels/test_prefill_attention.py::test_batch_invariant_bits_do_not_depend_on_chunks_pages_batch_or_config[triton]
kernels/test_prefill_regressions.py::test_encoder_reaches_packed_images_beyond_32_bits[encoder_attention-triton]
kernels/test_int4_regressions.py::test_x_with_offsets_beyond_32_bits[rows-int4_swiglu-triton-0]
kernels/test_offsets_beyond_32_bits.py::test_offsets_beyond_32_bits[swiglu-triton-0]
kernels/test_int4_metamorphic.py::test_rows_of_x_are_bitwise_independent_of_each_other[float32-sub-int4_matmul-splitk-0]
models/test_batch_invariance.py::test_logits_bitwise_equal_for_every_batch_chunking_and_page_size[one layer-cuda-None]
"""
MAX_TESTS = 35  # here; `python -m bench.standin --emulate sm_90 pytest -m gpu` runs all
QUESTIONS = 16


def named() -> list[str]:
    """A faithful test of every implementation with a Triton kernel, and the special cases."""
    discover()
    kernels = [impl for op in OPS.values() for impl in op.impls.values() if uses_triton_kernels(impl)]
    faithful = [f"kernels/test_every_kernel.py::test_faithful[{impl.op}-{impl.name}-0]" for impl in kernels]
    return [f"tests/{name}" for name in (*(line.strip() for line in SPECIAL.strip().splitlines()), *faithful)]


def every_kernel() -> set[str]:
    """Names of the functions of kernels/ that are launched, not called by others."""
    modules = [module for name, module in sys.modules.items() if name.startswith("vila_triton.kernels.")]
    functions = {name: value for module in modules for name, value in vars(module).items()}
    return {name for name, x in functions.items() if isinstance(x, KernelInterface) and name.endswith("kernel")}


def run_emulated(target: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a module on the stand-in with kernels compiled for the target."""
    env = {**os.environ, "HYPOTHESIS_PROFILE": "standin"}
    command = [sys.executable, "-m", "bench.standin", "--emulate", target, *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_selected_gpu_tests_pass_on_the_stand_in(tmp_path: Path) -> None:
    tests, counts = named(), tmp_path / "counts.json"
    assert len(tests) <= MAX_TESTS
    done = run_emulated("sm_90", "--counts", str(counts), "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *tests)
    assert re.match(rf"{len(tests)} passed(, \d+ warnings?)? in ", done.stdout.splitlines()[-1]), done.stdout
    assert json.loads(counts.read_text())["launches"].keys() >= every_kernel()


def test_question_is_answered_by_emulated_kernels() -> None:
    model, image = BUNDLED_CHECKPOINT.with_name("checkpoint-int4"), EXAMPLES_DIR / "a.png"
    words = ["--emulate", "sm_80", "--model", str(model), "--dtype", "bfloat16", "--image", str(image)]
    command = [sys.executable, "-m", "vila_triton", "ask", *words, "How many blue shapes are there?"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    (line,) = done.stderr.splitlines()
    for choice in ("decode_attention=triton", "int4_matmul=splitk, int4_swiglu=triton"):
        assert choice in line
    assert "(emulated, sm_80); else reference" in line


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("checkpoint", ["checkpoint", "checkpoint-int4"])
def test_emulated_model_gives_the_answers_of_torch(checkpoint: str, target: str, tmp_path: Path) -> None:
    """A GPU's default kernels in bfloat16, compiled and emulated, answer as the references do."""
    model, counts = BUNDLED_CHECKPOINT.with_name(checkpoint), tmp_path / "counts.json"
    options = [
        "--model",
        str(model),
        "--dtype",
        "bfloat16",
        "--limit",
        str(QUESTIONS),
        "--against",
        "kernels.*=reference",
    ]
    done = run_emulated(target, "--counts", str(counts), "vila_triton.tiny.evaluate", *options)
    assert done.stdout.startswith(f"{QUESTIONS} of {QUESTIONS} answers are the same under ")
    expected = {"_decode_attention_kernel", "_prefill_attention_kernel", "_encoder_attention_kernel"}
    expected |= {"_int4_matmul_splitk_kernel", "_int4_swiglu_kernel"} if "int4" in checkpoint else {"_swiglu_kernel"}
    assert json.loads(counts.read_text())["launches"].keys() >= expected


def test_stand_in_tests_pass_on_the_stand_in() -> None:
    words = ["pytest", "-q", "-p", "no:cacheprovider", "tests/on_standin"]
    done = subprocess.run([sys.executable, "-m", "bench.standin", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"\d+ passed(, \d+ (deselected|warnings?))* in ", done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (["bench.sorcery"], "there is no module bench.sorcery that can be run"),
        (["bench.measure"], "there is no module bench.measure that can be run"),
        (["--emulate", "sm_75", "this"], "invalid choice: 'sm_75'"),
        (["--counts", "nowhere/counts.json", "this"], "--counts: there is no folder"),
    ],
)
def test_stand_in_bad_usage_is_one_line(words: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bench.standin", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
