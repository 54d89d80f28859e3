"""Triton's interpreter runs loops under every numpy, and the chat summary says when it was used."""

from collections import Counter
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from bench.correctness.error_budget import DEVICE
from vila_triton.commands.chat import kernels_summary
from vila_triton.ops import rms_norm
from vila_triton.registry import discover, use
from vila_triton.registry.interpreter import patch_scalar_index


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels are compiled here, not interpreted")
def test_a_loop_up_to_an_argument_runs_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton 3.6 has it under numpy 2.4, and later a Triton that is put right already."""
    discover()
    patch = interpreter._patch_lang_tensor

    def refusing(self: Any) -> int:
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    def without_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", refusing)

    x, weight = torch.randn(2, 1100), torch.randn(1100)  # more than one block, which takes a loop
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", without_index)
    with use(rms_norm="triton"):
        with pytest.raises(interpreter.InterpreterError, match="only 0-dimensional arrays"):
            rms_norm(x, weight, 1e-5)
        patch_scalar_index()
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5))


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels are compiled here, not interpreted")
def test_the_language_is_patched_once_a_launch_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a program, nor in each device function, of which `tl.sum` is one."""
    discover()
    patched, patch = Counter[str](), interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: (patched.update(["once"]), patch(*args)))
    load, counts = tl.load, []
    for rows in (1, 8):
        patched.clear()
        rms_norm.impls["triton"](torch.randn(rows, 40), torch.randn(40), 1e-5)
        counts.append(patched["once"])
        assert tl.load is load
    assert 0 < counts[0] == counts[1]


def test_the_chat_summary_reports_the_interpreter_only_for_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    discover()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels_summary(Counter({("linear", "reference"): 3})) == "kernels: reference"
    aten = Counter({("linear", "aten"): 3, ("rope", "reference"): 1})
    assert kernels_summary(aten) == "kernels: linear=aten; else reference"
    ran = Counter({("linear", "aten"): 3, ("rope", "triton"): 1})
    assert kernels_summary(ran) == "kernels: linear=aten, rope=triton (interpreted); else reference"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "interpreted" not in kernels_summary(ran)
    with use(rope="triton", swiglu="reference"):
        assert kernels_summary(aten) == "kernels: linear=aten; else reference; nothing called swiglu"
