"""Laws of the products with int4 weights, for every variant and config: what may change nothing, and what changes how.

Where the arithmetic stays as it is, or rounds nothing, not a bit may differ; else what `budget` allows, twice.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from bench.correctness.error_budget import DEVICE, error_budget, example_args
from bench.correctness.guarded_memory import bit_pattern, guarded_allocations, map_tensors
from vila_triton.ops import Int4, dequantize, int4_matmul, int4_swiglu
from vila_triton.ops.int4_tiles import pack_tiles
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.registry import REFERENCE, Impl, Op, Unsupported, discover

discover()
Config = Mapping[str, Any]
ALL: list[tuple[Op, Impl, Config]] = [
    (op, impl, config)
    for op in (int4_matmul, int4_swiglu)
    for impl in op.impls.values()
    if impl.name != REFERENCE
    for config in impl.configs
]
LIBRARY = {"aten", "bags", "blocked", "dequant", "unfused", "rowwise"}  # variants whose sums a library takes
KINDS = pytest.mark.parametrize("dtype, order", [("float32", "sub"), ("float16", "fma")])
ORDERS = pytest.mark.parametrize("order", ["sub", "fma"])


def each(cases: list[tuple[Op, Impl, Config]]) -> pytest.MarkDecorator:
    ids = [f"{op.name}-{impl.name}-{list(impl.configs).index(config)}" for op, impl, config in cases]
    return pytest.mark.parametrize("op, impl, config", cases, ids=ids)


EVERY, INVARIANT = each(ALL), each([case for case in ALL if case[1].batch_invariant])


def drawn(op: Op, m: int = 3, **sizes: Any) -> tuple[Any, ...]:
    """Arguments at a shape that every variant serves and no block divides."""
    bias = {"bias": False} if op is int4_matmul else {}
    usual = {"m": m, "n": 48, "G": 3, "group": 64, "dtype": "float16", "order": "sub", "seed": 0}
    return example_args(op, **{**usual, **bias, **sizes})


def run(impl: Impl, config: Config, *args: Any) -> Tensor:
    try:
        return impl(*args, config=config)
    except Unsupported as reason:
        pytest.skip(str(reason))


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(bit_pattern(a.contiguous()), bit_pattern(b.contiguous()))
    )


def assert_close(a: Tensor, b: Tensor, op: Op, args: tuple, columns: Any = slice(None)) -> None:
    """a and b are (columns of) the output for args, each within its budget."""
    _, (allowed,) = error_budget(op, args)
    worst = ((a.double() - b.double()).abs() / (2 * allowed[:, columns])).amax()
    assert worst <= 1, f"they differ by {worst:.1f} times what rounding explains"


def rows_of(w: Int4, rows: Tensor) -> Int4:
    """The weight of these rows of w."""
    return replace(w, qweight=pack_tiles(unpack_codes(w)[rows]), scales=w.scales[:, rows], zeros=w.zeros[:, rows])


SPLIT = each(
    [(op, impl, impl.configs[0]) for op, impl, config in ALL if config is impl.configs[0] and "SPLIT_K" in config]
)


@SPLIT
def test_result_within_budget_for_any_number_of_splits(op: Op, impl: Impl, config: Config) -> None:
    """Nor does it for whole numbers, whose sums are exact in any order: there every bit stays."""
    x, w, *terms = drawn(op, 2, G=5, group=128, n=17, bias=True, residual=True)
    ones = replace(w, scales=torch.ones_like(w.scales), rounding="fma")
    whole = (x * 4).round(), ones, *((term * 4).round() for term in terms)
    for args in ((x, w, *terms), whole):
        outs = [run(impl, {**config, "SPLIT_K": count}, *args) for count in (1, 2, 4, 8)]
        for out in outs[1:]:
            assert_close(out, outs[0], op, args)
            assert args is not whole or same(out, outs[0])


@pytest.mark.on_gpu
@pytest.mark.usefixtures("dots_in_order")
@INVARIANT
@KINDS
def test_rows_of_x_are_bitwise_independent_of_each_other(
    op: Op, impl: Impl, config: Config, dtype: str, order: str
) -> None:
    """Alone, in any company and at any place, its result has the same bits: the variants marked `batch_invariant`."""
    G = 5 if "SPLIT_K" in config else 2
    x, *weights = drawn(op, config.get("BLOCK_M", 1) + 2, G=G, dtype=dtype, order=order)
    together, last = run(impl, config, x, *weights), len(x) - 1
    for rows in ([0], [last, 1, 0, 0]):
        assert same(run(impl, config, x[rows], *weights), together[rows])


def test_library_products_are_not_marked_batch_invariant() -> None:
    assert {impl.name for _, impl, _ in ALL if not impl.batch_invariant} == LIBRARY - {"rowwise"}


@pytest.mark.skipif(DEVICE != "cpu", reason="it says which product the CPU's library takes")
def test_library_products_depend_on_the_batch() -> None:
    """They may choose another way to sum for another number of rows; float32 shows that this one does."""
    x, w, *_ = drawn(int4_matmul, 40, dtype="float32", G=9)
    blocked = int4_matmul.impls["blocked"]
    assert not same(blocked(x[:1], w), blocked(x, w)[:1])


@pytest.mark.usefixtures("dots_in_order")
@EVERY
def test_permuted_rows_of_the_weight_permute_the_result(op: Op, impl: Impl, config: Config) -> None:
    """The results come in that order, from our kernels bit for bit. A library's product sums some columns otherwise."""
    args = x, *weights = drawn(op, dtype="float32")
    to = torch.randperm(48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    moved = run(impl, config, x, *(w and rows_of(w, to) for w in weights))
    there = run(impl, config, *args)[:, to]
    assert_close(moved, there, op, args, to)
    assert same(moved, there) or impl.name in LIBRARY


@EVERY
@ORDERS
def test_scales_times_four_multiply_the_result_by_four(op: Op, impl: Impl, config: Config, order: str) -> None:
    """Nothing is rounded otherwise, so the result is four times what it was, bit for bit; of swiglu's two weights it is
    up that is scaled. Only numbers below the smallest that has all its digits round otherwise."""
    x, *weights = drawn(op, order=order)
    at = 0 if op is int4_matmul else 1
    scaled = [replace(w, scales=w.scales * 4) if i == at else w for i, w in enumerate(weights)]
    before, after = run(impl, config, x, *weights), run(impl, config, x, *scaled)
    whole = before.abs() >= torch.finfo(before.dtype).smallest_normal
    assert whole.float().mean() > 0.9 and same(after[whole], 4 * before[whole])


@each([case for case in ALL if case[0] is int4_matmul])
def test_bias_and_residual_are_added_to_the_result(op: Op, impl: Impl, config: Config) -> None:
    """Once the sum is complete, in float32, so that our kernels round as additions to the result do."""
    args = x, w, bias, residual = drawn(op, dtype="float32", bias=True, residual=True)
    got, plus = run(impl, config, *args), run(impl, config, x, w) + bias + residual
    assert_close(got, plus, op, args)
    assert same(got, plus) or impl.name in LIBRARY


@each([case for case in ALL if case[0] is int4_matmul and case[1].name != "aten"])  # whose formula is another
@pytest.mark.parametrize(
    "dtype, order, G, group",
    [
        pytest.param("float16", "sub", 2, 64, marks=pytest.mark.on_gpu),
        pytest.param("float16", "fma", 2, 64, marks=pytest.mark.on_gpu),
        ("float16", "sub", 3, 32),
        ("float16", "fma", 1, 72),
        ("float32", "sub", 1, 72),
    ],
)
def test_every_weight_is_rounded_as_int4_rounding_says(
    op: Op, impl: Impl, config: Config, dtype: str, order: str, G: int, group: int
) -> None:
    """An x of one 1 per row picks weights out: bit for bit those of `dequantize`, in either order. The scaled sums of a
    kernel that rounds no weight are here sums of one, and are rounded as they are written.
    """
    w = drawn(op, dtype=dtype, order=order, G=G, group=group)[1]
    columns = torch.randperm(G * group, generator=torch.Generator().manual_seed(1))[:5].to(DEVICE)
    x = torch.eye(G * group, dtype=w.scales.dtype, device=DEVICE)[columns]
    assert torch.equal(run(impl, config, x, w), dequantize(w, x.dtype)[:, columns].t())


def backwards(self: Any, x: int, y: int, z: int) -> None:
    self.grid_idx = tuple(n - 1 - i for n, i in zip(self.grid_dim, (x, y, z)))


@EVERY
@KINDS
def test_two_runs_are_bitwise_equal(op: Op, impl: Impl, config: Config, dtype: str, order: str) -> None:
    """Whatever the memory it allocates held before, and (interpreted) in whichever order its programs run."""
    args = drawn(op, 4, dtype=dtype, order=order)
    first = run(impl, config, *args)
    with guarded_allocations(), patch.object(InterpreterBuilder, "set_grid_idx", backwards):
        assert same(run(impl, config, *map_tensors(torch.clone, args)), first)
