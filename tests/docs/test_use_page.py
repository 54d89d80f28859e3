"""The scripts of kernels/USE.md: each runs by itself, and what they define equals torch within the error budget."""

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from documents import ROOT, blocks, without_numbers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.correctness.error_budget import (
    DEVICE,
    call_or_reject,
    check_within_budget,
    error_budget,
    error_over_budget,
    run_property,
)
from vila_triton import PagedCache
from vila_triton.ops import (
    decode_attention,
    dequantize,
    int4_matmul,
    int4_matmul_backward,
    prefill_attention,
    without_context,
)
from vila_triton.registry import Op, count_calls, use

SCRIPTS = {
    re.findall(r"^(?:class|def) (\w+)", block.body, re.M)[0]: block.body
    for block in blocks(ROOT / "kernels" / "USE.md")
    if block.language == "python" and block.body.startswith("import torch\n")
}
DTYPES = st.sampled_from([torch.float32, torch.float16])
SEEDS = st.integers(0, 2**16)


@cache
def run_script(name: str) -> tuple[dict[str, Any], str]:
    """The names that the script of a function or class defines, and its output, on the device of the tests."""
    body = SCRIPTS[name]
    assert body.count('device = "cpu"') == body.count("cpu") == 1  # all that a GPU changes
    namespace: dict[str, Any] = {"__name__": "script"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(body.replace('"cpu"', f'"{DEVICE}"', 1), name, "exec"), namespace)
    return namespace, printed.getvalue()


def choose(**choices: str) -> AbstractContextManager[None]:
    """`use` of these implementations, where "" leaves the choice to configs/kernels.toml."""
    named = {op: impl for op, impl in choices.items() if impl}
    return use(**named) if named else nullcontext()


@pytest.mark.parametrize("name", ["Int4Linear", "attend", "causal_attention"])
def test_script_runs_by_itself_and_prints_what_the_page_shows(name: str) -> None:
    printed = run_script(name)[1]
    shown = "".join(f"{line}\n" for line in re.findall(r"print\(.*\)  # (.*)$", SCRIPTS[name], re.M))
    assert "True" in printed and "False" not in printed
    assert without_numbers(printed) == without_numbers(shown)


@pytest.mark.slow
def test_a_type_checker_has_nothing_to_say_of_them(tmp_path: Path) -> None:
    for name, body in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(body)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"})
    )
    command = [sys.executable, "-m", "pyright", "--project", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_the_page_has_three_scripts() -> None:
    assert list(SCRIPTS) == ["Int4Linear", "attend", "causal_attention"]


@pytest.mark.parametrize("impl", ["", "splitk", "prefill"])
def test_int4_linear_equals_the_dense_one_of_the_rounded_weight(impl: str) -> None:
    int4_linear: Callable[..., Any] = run_script("Int4Linear")[0]["Int4Linear"]

    @given(
        st.tuples(st.integers(1, 3), st.integers(1, 5)),
        st.integers(1, 40),
        st.tuples(st.integers(1, 3), st.sampled_from([32, 64])),
        DTYPES,
        st.booleans(),
        SEEDS,
    )
    def check(
        rows: tuple[int, int], n: int, groups: tuple[int, int], dtype: torch.dtype, bias: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        (G, group), k = groups, groups[0] * groups[1]
        linear = nn.Linear(k, n, bias, DEVICE, dtype)
        layer, x = int4_linear(linear, group), torch.randn(*rows, k, device=DEVICE, dtype=dtype, requires_grad=True)
        w = layer.weight
        assert len(w.scales) == G
        with choose(int4_matmul=impl), count_calls() as ran:
            out = call_or_reject(layer, x)
            assert not impl or ran == {("int4_matmul", impl): 1}
            (grad,) = torch.autograd.grad(out, x, grad_out := torch.randn_like(out))
        _, (budget,) = error_budget(int4_matmul, (x.detach(), w, None if linear.bias is None else linear.bias.detach()))
        inputs = x.detach().double().requires_grad_()
        dense = F.linear(inputs, dequantize(w, torch.float64), linear.bias.double() if bias else None)
        check_within_budget(0, out.detach(), dense.detach(), budget)
        _, (grad_budget,) = error_budget(int4_matmul_backward, (grad_out, w))
        check_within_budget(1, grad, torch.autograd.grad(dense, inputs, grad_out.double())[0], grad_budget)

    run_property(check)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def torch_gradients(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The gradients of torch's attention, as the reference of an op, so that it has a budget."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        return torch.autograd.grad(torch_attention(*leaves), leaves, grad_out.to(q.dtype))


@pytest.mark.parametrize("impl", ["", "triton"])
def test_causal_attention_equals_torchs_with_its_gradients(impl: str) -> None:
    causal_attention = run_script("causal_attention")[0]["causal_attention"]

    @given(
        st.integers(1, 3),
        st.integers(1, 40),
        st.tuples(st.integers(1, 2), st.integers(1, 3)),
        st.sampled_from([16, 32, 64]),
        DTYPES,
        SEEDS,
    )
    def check(b: int, t: int, heads: tuple[int, int], d: int, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        g, h = heads[0], heads[0] * heads[1]
        q, k, v = (torch.randn(b, n, t, d, device=DEVICE, dtype=dtype, requires_grad=True) for n in (h, g, g))
        with choose(prefill_attention=impl, prefill_attention_backward=impl), count_calls() as ran:
            out = call_or_reject(causal_attention, q, k, v)
            grads = torch.autograd.grad(out, [q, k, v], grad_out := torch.randn_like(out))
        assert not impl or ran == {("prefill_attention", impl): 1, ("prefill_attention_backward", impl): 1}
        plain = [x.detach() for x in (q, k, v)]
        rows = [x.transpose(1, 2).flatten(0, 1) for x in plain]  # [b t, heads, d]
        starts = t * torch.arange(b + 1, dtype=torch.int32, device=DEVICE)
        _, (budget,) = error_budget(prefill_attention, (*rows, *without_context(rows[1], starts), d**-0.5))
        budget = budget.unflatten(0, (b, t)).transpose(1, 2)  # [b, h, t, d]
        check_within_budget(0, out.detach(), torch_attention(*(x.double() for x in plain)), budget)
        if t == 1:  # gradients of q and k are 0, a difference of rounded numbers that torch does not take
            return
        wants, budgets = error_budget(Op(torch_gradients, False), (grad_out, *plain))
        for grad, want, whole in zip(grads, wants, budgets, strict=True):  # as in tests/ops/test_op_gradients.py
            assert error_over_budget(grad, want, whole.amax()).amax() <= 1

    run_property(check)


@pytest.mark.parametrize(("impl", "pages"), [("", "plain"), ("", "int8"), ("triton", "plain"), ("triton", "int4")])
def test_paged_decode_equals_torchs_attention_to_what_the_pages_hold(impl: str, pages: str) -> None:
    """Two prompts, a fork of the first, and one token of each of the three sequences."""

    @given(st.lists(st.integers(1, 40), min_size=2, max_size=2), st.sampled_from([16, 32]), SEEDS)
    def check(prompts: list[int], page_size: int, seed: int) -> None:
        attend = run_script("attend")[0]["attend"]
        torch.manual_seed(seed)
        sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "page_size": page_size}
        cache = PagedCache(16, **sizes, dtype=torch.float32 if pages == "plain" else pages, device=DEVICE)
        seqs = [cache.allocator.add_sequence() for _ in prompts]

        def new_tokens(s: int) -> list[Tensor]:
            return [torch.randn(s, heads, 64, device=DEVICE) for heads in (8, 2, 2)]

        with choose(decode_attention=impl):
            with cache.append_step(dict(zip(seqs, prompts))) as step:
                for layer in range(2):
                    attend(step, layer, *new_tokens(sum(prompts)), decoding=False)
            seqs.append(cache.allocator.fork(seqs[0]))
            with cache.append_step(dict.fromkeys(seqs, 1)) as step:
                q, k, v = new_tokens(3)
                out = call_or_reject(attend, step, 1, q, k, v, decoding=True)
        kv = step.layer(1)
        _, (budget,) = error_budget(decode_attention, (q, kv, step.seq_lens, 0.125))
        for i, length in enumerate((*prompts, prompts[0])):
            keys, values = (x.double().transpose(0, 1) for x in kv.gather(i, length + 1))  # [g, t, d]
            want = F.scaled_dot_product_attention(q[i].double()[:, None], keys, values, enable_gqa=True)  # [h, 1, d]
            check_within_budget(i, out[i], want[:, 0], budget[i])

    run_property(check)


@pytest.mark.parametrize("name", ["Int4Linear", "causal_attention"])
def test_torch_compile_takes_them_whole(name: str) -> None:
    torch.manual_seed(0)
    if name == "Int4Linear":
        fn = run_script(name)[0][name](nn.Linear(64, 24, device=DEVICE), 32)
        args = (torch.randn(3, 64, device=DEVICE, requires_grad=True),)
    else:
        fn = run_script(name)[0][name]
        args = tuple(torch.randn(2, heads, 9, 16, device=DEVICE, requires_grad=True) for heads in (4, 2, 2))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    out, want = compiled(*args), fn(*args)
    torch.testing.assert_close(out, want)
    both = (torch.autograd.grad(x.square().sum(), args) for x in (out, want))
    torch.testing.assert_close(*both)
