"""Ops as `torch.library` custom ops: torch's own opcheck, errors, and a decoder layer compiled into one graph."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import config as dynamo

from bench.correctness.error_budget import DEVICE, example_args
from vila_triton import ops
from vila_triton.cache.paged_cache import PagedBatch, PagedKVCache
from vila_triton.engine import engine
from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.params import init_tree, tree_map
from vila_triton.ops import without_context
from vila_triton.registry import OPS, OneOf, Op, count_calls, custom_ops, discover, op, use

discover()
CFG = LlamaConfig(
    vocab_size=16,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
OF_A_MODEL = """int4_matmul int4_swiglu linear rms_norm rope swiglu kv_write prefill_attention decode_attention
    encoder_attention layer_norm"""


def example(op: Op, seed: int, **sizes: Any) -> tuple:
    """Arguments of the custom op of an op; those that can have a gradient require it."""
    usual = {n: d.values[0] if isinstance(d, OneOf) else max(d.low, min(d.high, 3)) for n, d in op.domain.items()}
    takes = custom_ops.schema_arguments(op)
    args = example_args(op, seed, **usual | sizes)
    if op is ops.prefill_attention:  # what is read from pages has no gradient
        args = (*args[:3], *without_context(args[1], args[4].query_start_loc), *args[5:])
    values = op.bind(args, {}) | ({"return_lse": True} if op.keeps_lse else {})
    for name in op.differentiable:
        if isinstance(x := values[name], Tensor):
            values[name] = x.requires_grad_()
    return tuple(custom_ops.flatten_args(takes, values))


def opcheck(op: Op, **sizes: Any) -> None:
    """Run torch's check that the schema declares all mutations and that fake results have the shapes of real ones."""
    torch.library.opcheck(getattr(torch.ops.vila_triton, op.name).default, example(op, 0, **sizes))


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.custom_op], ids=lambda op: op.name)
def test_custom_op_passes_opcheck(op: Op) -> None:
    opcheck(op)


def test_custom_op_without_the_optional_tensor_passes_opcheck() -> None:
    opcheck(ops.int4_matmul, order="fma", bias=False)


def test_custom_op_with_every_optional_tensor_passes_opcheck() -> None:
    opcheck(ops.int4_matmul, bias=True, residual=True)


def test_every_op_of_a_model_is_a_custom_op() -> None:
    assert {name for name, op in OPS.items() if op.custom_op} >= set(OF_A_MODEL.split())


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op of its own, forgotten after the test."""

    def test_doubled(x: Tensor, y: Tensor) -> Tensor:
        return 2 * x

    monkeypatch.setitem(OPS, "test_doubled", None)
    made = op(test_doubled)
    made.example_inputs(lambda *, rng, device: (torch.ones(3, device=device), torch.ones(3, device=device)))
    return made


def test_opcheck_rejects_a_wrong_fake_impl_and_an_undeclared_mutation(doubled: Op) -> None:
    doubled.fake_impl(lambda x, y: x.new_empty(x.shape))
    opcheck(doubled)
    doubled.fake_impl(lambda x, y: x.new_empty(len(x) + 1))
    with pytest.raises(Exception, match=r"[Ss]hape"):
        opcheck(doubled)
    doubled.fake_impl(lambda x, y: x.new_empty(x.shape))
    doubled.impl("writes")(lambda x, y: 2 * x.add_(1))
    with use(test_doubled="writes"), pytest.raises(Exception, match="mutated"):
        opcheck(doubled)


def test_annotations_without_a_schema_are_refused(doubled: Op) -> None:
    def listed(x: list[Tensor]) -> Tensor:
        return x[0]

    with pytest.raises(TypeError, match=r"listed: x is annotated list\[.*expected a dataclass or one of Tensor"):
        custom_ops.CustomOp(Op(listed, False), None)
    with pytest.raises(TypeError, match=r"test_doubled.mutates: no argument z"):
        doubled.mutates("z")
    with pytest.raises(TypeError, match=r"test_doubled returns .*, expected a tuple of Tensors, and after them x,"):
        doubled.mutates("x")


def test_a_wrong_number_of_results_is_an_error(doubled: Op, fresh: None) -> None:
    doubled.fake_impl(lambda x, y: x.new_empty(x.shape))
    doubled.impl("two")(lambda x, y: (2 * x, 2 * y))
    compiled = torch.compile(lambda x: doubled(x, x), fullgraph=True, backend="eager")
    with use(test_doubled="two"), pytest.raises(TypeError, match="test_doubled returns 2 new tensors, expected 1"):
        compiled(torch.ones(3))


def test_a_call_with_return_lse_runs_the_chosen_implementation_between_two_graphs(fresh: None) -> None:
    sizes = {"b": 2, "s": 4, "t": 3, "g": 1, "ratio": 1, "d": 32, "l": 16, "dtype": "float32"}
    args = ops.prefill_attention.make_example(**sizes, rng=torch.Generator().manual_seed(0), device=DEVICE)

    @torch.compile(backend="eager")
    def compiled(*args: Any) -> Any:
        return ops.prefill_attention(*args, return_lse=True)

    with use(prefill_attention="simple"), count_calls() as ran:
        out = compiled(*args)
    assert set(ran) == {("prefill_attention", "simple")}
    torch.testing.assert_close(out, ops.prefill_attention.reference(*args, return_lse=True))


def layer(p: llama.Layer, x: Tensor, rotary: tuple[Tensor, Tensor], cache: PagedBatch) -> Tensor:
    """One decoder layer, as `llama.llama` runs it."""
    x = x + llama.attention(p, ops.rms_norm(x, p.attention_norm, CFG.rms_norm_eps), rotary, 1, CFG, cache)
    return x + llama.mlp(p, ops.rms_norm(x, p.mlp_norm, CFG.rms_norm_eps))


def parts(weights: str) -> tuple[llama.Layer, PagedKVCache, list[int], Tensor]:
    """A layer, an empty cache, two sequences in it, and 11 rows of input."""
    model = init_tree(llama.param_specs(CFG, torch.float32), torch.Generator().manual_seed(0))
    p = (llama.quantize_linears_rtn(model, 32) if weights == "int4" else model).layers[1]
    cache = PagedKVCache(CFG, 8, dtype=torch.float32, device=DEVICE)
    for pages in ops.page_tensors(cache.k_pages) + ops.page_tensors(cache.v_pages):
        pages.zero_()
    x = torch.randn(11, CFG.hidden_size, generator=torch.Generator().manual_seed(1))
    sequences = [cache.allocator.add_sequence(), cache.allocator.add_sequence()]
    return tree_map(lambda leaf: leaf.to(DEVICE), p), cache, sequences, x.to(DEVICE)


@torch.no_grad()
def run(fn: Callable[..., Tensor], weights: str) -> list[Tensor]:
    """The layer on a ragged prefill, and on two steps of decoding: its outputs, and what it leaves in the pages."""
    p, cache, sequences, x = parts(weights)
    outputs = []
    for counts, rows in (((3, 4), x[:7]), ((1, 1), x[7:9]), ((1, 1), x[9:])):
        with (
            cache.append_step(dict(zip(sequences, counts))) as step,
            engine.use_default_kernels(rows.device, step.phase),
        ):
            outputs.append(fn(p, rows, llama.rotary_cos_sin(step.positions, CFG), step))
    return [*outputs, *ops.page_tensors(cache.k_pages), *ops.page_tensors(cache.v_pages)]


@pytest.fixture
def fresh() -> None:
    torch.compiler.reset()


COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler, and there is none")
CASES = [("aot_eager", "dense"), ("aot_eager", "int4"), pytest.param("inductor", "int4", marks=COMPILER)]


@pytest.mark.parametrize(("backend", "weights"), CASES)
def test_a_layer_compiles_into_one_graph_and_gives_the_eager_result(backend: str, weights: str, fresh: None) -> None:
    want = run(layer, weights)
    with count_calls() as calls:
        got = run(torch.compile(layer, fullgraph=True, backend=backend), weights)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    ran = {name for name, _ in calls}
    assert ran >= {"rms_norm", "rope_kv_write", "prefill_attention", "decode_attention"}
    assert ran >= ({"int4_matmul", "int4_swiglu"} if weights == "int4" else {"linear", "swiglu"})


def test_implementations_are_chosen_when_compiled_code_runs(fresh: None) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with use(rms_norm="reference"):
        run(compiled, "dense")
    OPS["rms_norm"].impl("zero")(lambda x, weight, eps: torch.zeros_like(x))
    try:
        with use(rms_norm="zero"), count_calls() as calls, dynamo.patch(error_on_recompile=True):
            outputs = run(compiled, "dense")
    finally:
        del OPS["rms_norm"].impls["zero"]
    assert calls["rms_norm", "zero"] == 6 and not calls["rms_norm", "reference"]
    assert not outputs[-1].any()  # the values that were written


def test_wrong_arguments_are_refused_while_tracing(fresh: None) -> None:
    compiled = torch.compile(lambda x, w: ops.rms_norm(x, w, 1e-5), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"rms_norm: weight has shape \[5\], expected \[e=8\]"):
        compiled(torch.ones(2, 8), torch.ones(5))
    assert ops.rms_norm.custom_op
    with pytest.raises(TypeError, match="rms_norm takes x, weight, eps"):
        ops.rms_norm.custom_op(torch.ones(2, 8), torch.ones(8), epsilon=1)


def squared_product(x: Tensor, w: Tensor) -> Tensor:
    return ops.linear(F.silu(x), w).square().sum()


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=[COMPILER, pytest.mark.slow])]
)
def test_compiled_code_runs_ops_in_its_backward_pass(backend: str, fresh: None) -> None:
    args = x, w = torch.ones(3, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    want = torch.autograd.grad(squared_product(x, w), args)
    compiled = torch.compile(squared_product, fullgraph=True, backend=backend)
    with use(linear="triton"):
        compiled(x, w).backward()
    with use(linear="reference"), count_calls() as calls:
        loss = compiled(x, w)
    got = torch.autograd.grad(loss, args)  # after the `with`
    torch.testing.assert_close(got, want)
    assert calls == {("linear", "reference"): 3}


def test_a_gradient_of_the_log_sum_exp_is_refused_behind_compiled_code(fresh: None) -> None:
    q = torch.ones(1, 3, 2, 16, requires_grad=True)
    out, lse = torch.compile(lambda q: ops.encoder_attention(q, q, q, 0.25, True), backend="eager")(q)
    with pytest.raises(RuntimeError, match="log-sum-exp has no gradient"):
        (out.sum() + lse.sum()).backward(retain_graph=True)
    out.sum().backward()


def test_compiled_products_are_cast_by_autocast(fresh: None) -> None:
    args = x, w = torch.ones(3, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        want = torch.autograd.grad(squared_product(x, w), args)
        got = torch.autograd.grad(torch.compile(squared_product, fullgraph=True, backend="aot_eager")(x, w), args)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["int4", "dense"])
@torch.no_grad()
def test_a_decode_step_is_captured_in_a_cuda_graph(weights: str) -> None:
    p, cache, sequences, rows = parts(weights)
    x, others = rows[:2].clone(), rows[2:4]
    with cache.append_step(dict.fromkeys(sequences, 1)) as step, engine.use_default_kernels(x.device, "decode"):
        rotary = llama.rotary_cos_sin(step.positions, CFG)
        layer(p, x, rotary, step)  # what is compiled at the first call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(p, x, rotary, step)
        x.copy_(others)
        graph.replay()
        assert torch.equal(out, layer(p, x, rotary, step))
