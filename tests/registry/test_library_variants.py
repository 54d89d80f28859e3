"""Implementations that call torch's own kernels: bfloat16, packed copies of weights, gradients."""

import gc
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch.backends import mkldnn

from bench.correctness.error_budget import (
    assert_matches_reference,
    call_or_reject,
    example_args,
    example_strategy,
    run_property,
)
from vila_triton.kernels import _cpu_product, _packed_copies, int4_matmul_aten, int4_matmul_bags  # pyright: ignore
from vila_triton.ops import Int4, int4_matmul
from vila_triton.registry import OPS, Impl, Op, Unsupported, count_calls, discover, use

discover()
HERE: list = [
    pytest.param(op, impl, id=f"{op.name}-{impl.name}")
    for op in OPS.values()
    for impl in op.impls.values()
    if impl.name in ("aten", "bags", "blocked", "unfused")
]
SIZES = {"m": 3, "n": 32, "G": 2, "group": 64, "dtype": "bfloat16", "order": "sub", "bias": False, "seed": 0}


@pytest.mark.parametrize("op, impl", HERE)
def test_library_variants_keep_the_error_budget_in_bfloat16(op: Op, impl: Impl) -> None:
    """The interpreter's trouble with bfloat16 is not theirs. The one that takes few weights gets those it takes."""
    few = (op, impl.name) == (int4_matmul, "aten")

    @given(sizes=example_strategy(op))
    def check(sizes: dict) -> None:
        taken = {"order": "sub"} if few else {}
        args = example_args(op, **{**sizes, **taken, "dtype": "bfloat16"})
        call_or_reject(assert_matches_reference, op, impl, impl.configs[0], args, sizes["seed"])

    run_property(check)


PACKING = {"aten": int4_matmul_aten.pack_for_aten, "bags": int4_matmul_bags.pack_for_bags}


def product(args: Any, name: str = "aten") -> torch.Tensor:
    return int4_matmul.impls[name](*args)


@pytest.mark.parametrize("name", PACKING)
def test_a_weight_is_packed_once_and_again_after_a_write(name: str) -> None:
    x, w, *_ = example_args(int4_matmul, **SIZES)
    first = product((x, w), name)
    copy = _packed_copies._copies[w.qweight][PACKING[name]][-1][0]
    assert torch.equal(product((x, w), name), first)
    assert _packed_copies._copies[w.qweight][PACKING[name]][-1][0] is copy
    w.scales.mul_(2)
    assert torch.equal(product((x, w), name), 2 * first)
    w.qweight.data = torch.zeros_like(w.qweight)  # as `Module.to` replaces what a parameter holds
    assert_matches_reference(int4_matmul, int4_matmul.impls[name], {}, (x, w))


def test_packed_copies_are_counted_each_once_and_as_large_as_the_codes() -> None:
    x, w, *_ = example_args(int4_matmul, **{**SIZES, "n": 512, "G": 8})
    codes = w.qweight.nbytes
    assert _packed_copies.packed_bytes([x, w.qweight]) == 0
    for name in ("aten", "bags", "aten"):
        product((x, w), name)
    assert 2 * codes < _packed_copies.packed_bytes([x, w.qweight]) < 2.2 * codes


def test_the_same_codes_with_other_scales_are_packed_separately() -> None:
    """Also where the new scales come to lie at the address of those before."""
    x, w, *_ = example_args(int4_matmul, **SIZES)
    first = product((x, w))
    scaled = None
    for factor in (2, 4, 8, 16) * 10:
        want = factor * first
        del scaled
        scaled = replace(w, scales=w.scales * factor)
        assert torch.equal(product((x, scaled)), want)


def test_a_packed_copy_is_freed_with_its_weight() -> None:
    x, w, *_ = example_args(int4_matmul, **SIZES)
    product((x, w))
    gc.collect()  # of other tests
    before = len(_packed_copies._copies)
    del w
    gc.collect()
    assert len(_packed_copies._copies) == before - 1


def test_a_weight_in_inference_mode_is_packed_every_time() -> None:
    with torch.inference_mode():
        x, w, *_ = example_args(int4_matmul, **SIZES)
        first = product((x, w))
        w.scales.mul_(2)
        assert torch.equal(product((x, w)), 2 * first) and w.qweight not in _packed_copies._copies


@pytest.mark.parametrize(("n", "group", "reason"), [(32, 16, "group is 16, but torch takes 32"), (32, 512, "is 512")])
def test_unsupported_shapes_are_refused_with_a_reason(n: int, group: int, reason: str) -> None:
    w = Int4.pack(torch.randn(n, 512), group)
    with pytest.raises(Unsupported, match=reason):
        product((torch.randn(1, 512), w))


def test_shifts_of_a_packed_weight_are_rounded_once() -> None:
    w = Int4.pack(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), 32)
    w = replace(w, scales=w.scales.float() * 1.1)  # of 24 bits, so that a product with a zero is rounded
    _, scales_and_shifts = int4_matmul_aten.pack_for_aten(w, torch.float32)
    exact = (8 - w.zeros.double()) * w.scales.double()
    assert torch.equal(scales_and_shifts[..., 1], exact.float())


@pytest.mark.parametrize(
    ("dtype", "rows", "product"),
    [
        ("float32", 1, "onednn"),
        ("float32", 2, "onednn"),
        ("float32", 256, "torch"),
        ("float32 avx512", 256, "onednn"),
        ("float16", 4, "torch"),
        ("float16", 5, "onednn"),
        ("bfloat16", 1, "torch"),
        ("bfloat16", 5, "onednn"),
        ("float64", 8, "torch"),
        ("bfloat16 instructions", 1, "torch without onednn"),
        ("bfloat16 instructions", 2, "torch"),
        ("bfloat16 instructions", 64, "torch"),
    ],
)
def test_linear_runs_the_fastest_product_of_each_dtype(
    dtype: str, rows: int, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, linear = [], F.linear

    def recorded(*args: Any) -> torch.Tensor:
        ran.append("torch" if mkldnn.enabled else "torch without onednn")
        return linear(*args)

    monkeypatch.setattr(F, "linear", recorded)
    dtype, _, has_instructions = dtype.partition(" ")
    monkeypatch.setattr(_cpu_product, "has_instructions_for", lambda _: has_instructions == "instructions")
    monkeypatch.setattr(_cpu_product, "has_avx512", lambda: has_instructions == "avx512")
    x = torch.ones(rows, 16, dtype=getattr(torch, dtype))
    assert OPS["linear"].impls["aten"](x, x[:1]).shape == (rows, 1)
    assert (ran or ["onednn"]) == [product]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_linear_runs_where_torch_has_no_onednn(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_linear_pointwise", raising=False)
    args = example_args(OPS["linear"], m=8, n=24, k=16, dtype=dtype, bias=True, residual=True, seed=0)
    assert_matches_reference(OPS["linear"], OPS["linear"].impls["aten"], {}, args)


@pytest.mark.parametrize("has_avx512", [False, True])
@pytest.mark.parametrize(("m", "filled"), [(15, 15), (17, 18), (23, 24), (100, 104), (255, 256), (300, 320)])
def test_rows_are_filled_up_so_that_onednn_keeps_few_kernels(
    m: int, filled: int, has_avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_product, "has_avx512", lambda: has_avx512)
    assert len(_cpu_product.filled_up(torch.ones(m, 1))) == filled
    for terms in ({"bias": False}, {"bias": True}, {"bias": True, "residual": True}):
        args = example_args(OPS["linear"], m=m, n=24, k=16, dtype="float32", seed=0, **terms)
        assert_matches_reference(OPS["linear"], OPS["linear"].impls["aten"], {}, args)


def test_few_numbers_of_rows_are_filled_up_to() -> None:
    assert len({len(_cpu_product.filled_up(torch.ones(m, 1))) for m in range(1, 4097)}) == 80


@pytest.mark.parametrize("has_instructions", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_blocks_of_a_weight_are_multiplied_in_half_precision_where_the_cpu_can(
    dtype: str, has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied = set()
    modules = [import_module(f"vila_triton.kernels.{name}") for name in ("int4_matmul_blocked", "_int4_blocks")]
    for product in (_cpu_product.float32_product, _cpu_product.half_product):

        def recorded(x: torch.Tensor, w: torch.Tensor, *rest: Any, f: Any = product) -> torch.Tensor:
            multiplied.update({x.dtype, w.dtype})
            return f(x, w, *rest)

        for module in modules:
            if hasattr(module, product.__name__):
                monkeypatch.setattr(module, product.__name__, recorded)
    for module in (modules[1], _cpu_product):
        monkeypatch.setattr(module, "has_instructions_for", lambda _: has_instructions)
    args = example_args(int4_matmul, **{**SIZES, "dtype": dtype})
    assert_matches_reference(int4_matmul, int4_matmul.impls["blocked"], {"BLOCK_N": 32}, args)
    assert multiplied == {getattr(torch, dtype) if has_instructions else torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [{}, {"group": 80}, {"order": "fma"}, {"n": 17}, {"m": 40}])
def test_the_default_on_a_cpu_serves_every_shape(dtype: str, sizes: dict) -> None:
    """`aten` refuses some; what runs instead is not the slowest there is, and needs no `use`."""
    args = example_args(int4_matmul, **{**SIZES, "dtype": dtype, **sizes})
    with count_calls() as calls:
        int4_matmul(*args)
    few = "aten" if dtype == "bfloat16" and not {"group", "order"} & sizes.keys() else "bags"
    assert calls == {("int4_matmul", "blocked" if "m" in sizes else few): 1}


def test_rows_are_taken_one_at_a_time() -> None:
    rowwise: Any = import_module("vila_triton.kernels.rowwise")
    x, taken = torch.randn(2, 3, 4), []
    assert torch.equal(rowwise.map_rows(lambda row: taken.append(row.shape) or 2 * row, x), 2 * x)
    assert taken == 6 * [(1, 4)]


@pytest.mark.parametrize(("s", "t", "masked"), [(3, 0, False), (1, 5, False), (3, 5, True)])
def test_prefill_builds_a_mask_only_for_several_queries_behind_a_context(
    s: int, t: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, attention = [], F.scaled_dot_product_attention

    def recorded(q: Any, k: Any, v: Any, mask: Any, **options: Any) -> torch.Tensor:
        masks.append(mask is not None)
        return attention(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    op = OPS["prefill_attention"]
    sizes: dict[str, Any] = {
        "b": 1,
        "s": s,
        "t": t,
        "g": 1,
        "ratio": 1,
        "d": 8,
        "l": 16,
        "dtype": "float32",
        "kv": "plain",
    }
    q, k, v, cache, batch, scale, *_ = example_args(op, 0, **sizes, numerics="fast")
    batch = replace(batch, query_start_loc=batch.query_start_loc * 0 + torch.tensor([0, s]).int())
    batch = replace(batch, context_lens=batch.context_lens * 0 + t)
    op.impls["aten"](q[:s], k[:s], v[:s], cache, batch, scale)
    assert masks == [masked]


def test_gradients_flow_through_the_default_linear() -> None:
    """oneDNN's product has none of its own."""
    args = x, w, bias, residual = tuple(
        torch.randn(*shape, requires_grad=True) for shape in ((9, 16), (8, 16), (8,), (9, 8))
    )
    want = torch.autograd.grad((F.linear(x, w, bias) + residual).square().sum(), args)
    with use(linear="aten"):
        got = torch.autograd.grad(OPS["linear"](*args).square().sum(), args)
    torch.testing.assert_close(got, want)


def test_swiglu_is_rounded_once_where_silu_is_subnormal() -> None:
    gate, up = torch.linspace(-14, -9, 500).half(), torch.linspace(3, 8, 500).half()
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    out = OPS["swiglu"].impls["aten"](gate[None], up[None])[0]
    assert torch.equal(out, exact.half())
    assert not torch.equal(torch.nn.functional.silu(gate) * up, exact.half())
