"""A call of an op outside an engine runs the implementation that an engine would run on its device."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.correctness.error_budget import check_within_budget, error_budget, example_args
from bench.correctness.guarded_memory import map_tensors
from vila_triton import ops
from vila_triton.engine import engine
from vila_triton.ops import without_context
from vila_triton.registry import OPS, OneOf, Op, Unsupported, count_calls, discover, use
from vila_triton.registry.kernel_config import configured_choices
from vila_triton.registry.size_ranges import implementation_at

discover()
EACH = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
CPU = pytest.mark.parametrize("op", [OPS[name] for name in configured_choices("cpu", None)], ids=lambda op: op.name)


def example(op: Op, **sizes: Any) -> tuple:
    usual = {n: d.values[0] if isinstance(d, OneOf) else max(d.low, min(d.high, 5)) for n, d in op.domain.items()}
    return op.make_example(**usual | sizes, rng=torch.Generator().manual_seed(0), device="cpu")


def ran(op: Op, args: tuple) -> str:
    with count_calls() as calls:
        op(*map_tensors(torch.clone, args))
    return next(impl for name, impl in calls if name == op.name)


@EACH
def test_a_call_runs_the_same_implementation_inside_and_outside_an_engine(op: Op) -> None:
    args = example(op)
    outside = ran(op, args)
    for phase in ("prefill", "decode"):
        with engine.use_default_kernels(torch.device("cpu"), phase):
            assert ran(op, args) == outside
    sizes = op.sizes_of(*args) if op.sizes_of else {}
    choice = configured_choices("cpu", None).get(op.name, "reference")
    assert outside == implementation_at(choice, sizes.get((*op.dynamic_sizes, "")[0], 0), sizes)
    with use(**{op.name: "reference"}):
        assert ran(op, args) == "reference"


@pytest.mark.parametrize("name", ["prefill_attention", "decode_attention"])
def test_a_batch_invariant_call_runs_a_batch_invariant_implementation(name: str) -> None:
    args = example(OPS[name], numerics="batch_invariant")
    with engine.use_default_kernels(torch.device("cpu"), "batch_invariant"):
        inside = ran(OPS[name], args)
    assert ran(OPS[name], args) == inside


@EACH
def test_a_call_on_meta_runs_the_reference_for_its_shapes(op: Op) -> None:
    assert op.choose_implementation(*map_tensors(lambda x: x.to("meta"), example(op))) == "reference"


@CPU
def test_float64_is_computed_in_float64(op: Op) -> None:
    args = map_tensors(lambda x: x.double() if x.is_floating_point() else x, example(op))
    torch.testing.assert_close(op(*args), op.reference(*args), rtol=1e-12, atol=1e-12)


def gradients(op: Op, fn: Any, args: tuple) -> list[Tensor]:
    """Of the sum of squares of what is returned, of all arguments that can have one."""
    values = {name: x.clone() if isinstance(x, Tensor) else x for name, x in op.bind(args, {}).items()}
    tensors = [x for name, x in values.items() if name in op.differentiable and isinstance(x, Tensor)]
    learning = [x.requires_grad_() for x in tensors if x.is_floating_point()]
    return list(torch.autograd.grad(fn(*values.values()).square().sum(), learning))


@CPU
def test_gradients_equal_those_of_the_reference(op: Op) -> None:
    if not op.differentiable:
        return
    args = example(op, **{"t": 0} if "t" in op.domain else {})
    if op.name == "prefill_attention":  # of which only the case without pages to read from has a gradient
        args = (*args[:3], *without_context(args[1], args[4].query_start_loc), *args[5:])
    for got, want in zip(gradients(op, op, args), gradients(op, op.reference, args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_kernel_without_a_rule_gets_the_gradient_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.rms_norm, "gradient_rule", None)
    monkeypatch.setattr(ops.rms_norm, "_saved", {})
    args = example(ops.rms_norm)
    want = gradients(ops.rms_norm, ops.rms_norm.reference, args)
    with use(rms_norm="triton"):
        torch.testing.assert_close(gradients(ops.rms_norm, ops.rms_norm, args), want)
        with torch.no_grad():
            assert not ops.rms_norm(args[0].requires_grad_(), *args[1:]).requires_grad


@pytest.mark.parametrize("op", [op for op in OPS.values() if not op.differentiable], ids=lambda op: op.name)
def test_an_op_without_a_gradient_refuses_arguments_that_require_one(op: Op) -> None:
    args = example(op)
    args[0].requires_grad_()
    name = next(iter(op.signature.parameters))
    with count_calls() as calls, pytest.raises(RuntimeError, match=f"{op.name}: {name} requires a gradient, but "):
        op(*args)
    assert not calls
    with torch.no_grad():
        op(*args)


def test_an_unsupported_default_recommends_the_reference() -> None:
    args = example(ops.decode_attention)
    with pytest.raises(
        Unsupported, match=r"log-sum-exp \('aten' runs here by default; `with use\(decode_attention=\"ref"
    ):
        ops.decode_attention(*args, return_lse=True)
    with use(decode_attention="reference"):
        out, lse = ops.decode_attention(*args, return_lse=True)
    assert lse.shape == out.shape[:2]
    with use(decode_attention="aten"), pytest.raises(Unsupported, match=r"log-sum-exp$"):  # chosen, so known
        ops.decode_attention(*args, return_lse=True)


def test_an_unsupported_inner_op_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise Unsupported("no")

    monkeypatch.setitem(OPS["swiglu"].impls, "aten", replace(OPS["swiglu"].impls["aten"], fn=refuse))
    with pytest.raises(Unsupported) as error:
        ops.int4_swiglu(*example(ops.int4_swiglu))
    assert str(error.value) == "no ('aten' runs here by default; `with use(swiglu=\"reference\")` runs the reference)"


def test_an_int4_product_on_a_cpu_does_not_run_the_reference() -> None:
    """The call that made the fault known: 4096 × 4096 took 40 times as long outside an engine."""
    args = example_args(ops.int4_matmul, 0, m=1, n=64, G=2, group=64, dtype="float32", order="sub", bias=True)
    args = map_tensors(lambda x: x.cpu(), args)
    with count_calls() as calls:
        out = ops.int4_matmul(*args)
    (exact,), (allowed,) = error_budget(ops.int4_matmul, args)
    check_within_budget(0, out, exact, allowed)
    assert calls == {("int4_matmul", "bags"): 1}


def test_ops_command_shows_the_implementations_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vila_triton.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["vila-triton", "ops", "--device", "cuda"])
    assert main() == 0
    said = capsys.readouterr().out
    assert "chosen on cuda for" in said and "There is no GPU here" in said and 'use(OP="reference")' in said
    (line,) = [line for line in said.splitlines() if line.split()[:2] == ["rms_norm", "triton"]]
    assert "prefill and decode and batch_invariant" in line
    assert said.count(" gradient: ") == len(OPS) and "gradient: of x, weight, by rms_norm_backward" in said
    assert "gradient: of x, weight, bias, by torch" in said and "gradient: none, what is written to v_pages" in said
