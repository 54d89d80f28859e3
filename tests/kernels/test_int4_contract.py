"""Arguments at the edge of what int4 products take: each works, or is refused in one sentence before any launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction
from vila_triton.kernels._int4_launch import fit_block_k  # pyright: ignore

from bench.correctness.error_budget import assert_matches_reference, example_args
from vila_triton.ops import Int4, dequantize, int4_matmul, int4_swiglu
from vila_triton.registry import OPS, Impl, Op, Unsupported, count_calls, discover, use

discover()
EACH: list = [
    pytest.param(op, impl, id=f"{op.name}-{impl.name}")
    for op in (int4_matmul, int4_swiglu)
    for impl in op.impls.values()
]
EACH_IMPL = pytest.mark.parametrize("op, impl", EACH)
LIBRARY = ("reference", "aten", "bags", "blocked", "unfused", "rowwise")  # no kernels of ours
KERNELS = pytest.mark.parametrize("op, impl", [case for case in EACH if case.values[1].name not in LIBRARY])


def drawn(op: Op, **sizes: Any) -> list[Any]:
    """x [2, 128], w [16, 128], a bias and a residual, or gate and up."""
    usual = {"m": 2, "n": 16, "G": 2, "group": 64, "dtype": "float16", "order": "sub", "seed": 0}
    return list(
        example_args(op, **{**usual, **({"bias": True, "residual": True} if op is int4_matmul else {}), **sizes})
    )


@contextmanager
def nothing_launched() -> Iterator[None]:
    launched = AssertionError("a kernel was launched")
    with (
        patch.object(GridExecutor, "__call__", side_effect=launched),
        patch.object(JITFunction, "run", side_effect=launched),
    ):
        yield


def leaf(**changes: Any) -> Any:
    """A weight with leaves changed: by a function of each, or to a value."""

    def changed(w: Int4) -> Int4:
        return replace(w, **{n: f(getattr(w, n)) if callable(f) else f for n, f in changes.items()})

    return changed


REFUSED = [  # the op, the place of an argument, what is done to it, and what is said
    (int4_matmul, 0, lambda x: x[:, :120], r"x has 120 columns, but w is \[16, 128\]"),
    (int4_matmul, 0, lambda x: x[0, 0], r"x has shape \[\], expected \[k\]"),
    (int4_matmul, 0, lambda x: x.int(), "x is torch.int32, expected a floating-point dtype"),
    (int4_matmul, 0, lambda x: x.bool(), "x is torch.bool, expected a floating-point dtype"),
    (int4_matmul, 0, lambda x: x.to("meta"), "w.scales is on .*, expected meta like the first argument"),
    (int4_matmul, 1, lambda w: dequantize(w, torch.float16), "w is a Tensor, expected an Int4"),
    (int4_matmul, 1, leaf(group_size=12), "k = 24 and group_size = 12, but k must be .* and group_size divide k"),
    (int4_matmul, 1, leaf(group_size=0), "k = 0 and group_size = 0, but k must be a positive multiple of 8"),
    (int4_matmul, 1, leaf(group_size=-64), "k = -128 and group_size = -64, but k must be a positive multiple of 8"),
    (int4_matmul, 1, leaf(group_size=40), "k = 80 and group_size = 40, but .* be a multiple of 16, unless it is k"),
    (int4_matmul, 1, leaf(group_size=32), r"x has 128 columns, but w is \[16, 64\]"),
    (int4_matmul, 1, leaf(scales=lambda s: s[:0], zeros=lambda z: z[:0]), "k = 0 and group_size = 64"),
    (int4_matmul, 1, leaf(rounding="other"), "w.rounding is 'other', expected one of sub, fma"),
    (int4_matmul, 1, leaf(qweight=lambda q: q.long()), "w.qweight is torch.int64, expected torch.int32"),
    (int4_matmul, 1, leaf(qweight=lambda q: q.view(1, 2, 4, 32)), r"\[1, 2, 4, 32\], expected \[1, 2, 32, 4\]"),
    (int4_matmul, 1, leaf(qweight=lambda q: q.flatten()), r"w.qweight has shape \[256\], expected \[1, 2, 32, 4\]"),
    (int4_matmul, 1, leaf(qweight=lambda q: q.to("meta")), "w.qweight is on meta, expected .* like x"),
    (int4_matmul, 1, leaf(scales=lambda s: s.t()), r"w.zeros has shape \[2, 16\], expected \[G=16, n=2\]"),
    (int4_matmul, 1, leaf(scales=lambda s: s.int()), "w.scales is torch.int32, expected a floating-point dtype"),
    (int4_matmul, 1, leaf(scales=lambda s: s.to("meta")), "w.scales is on meta, expected"),
    (int4_matmul, 1, leaf(zeros=lambda z: z[:, 1:]), r"w.zeros has shape \[2, 15\], expected \[G=2, n=16\]"),
    (int4_matmul, 1, leaf(zeros=lambda z: z.int()), "w.zeros is torch.int32, expected a floating-point dtype"),
    (int4_matmul, 1, leaf(zeros=lambda z: z.to("meta")), "w.zeros is on meta, expected"),
    (int4_matmul, 2, lambda b: b[:15], r"bias has shape \[15\], expected \[n=16\]"),
    (int4_matmul, 2, lambda b: b[None], r"bias has shape \[1, 16\], expected \[n=16\]"),
    (int4_matmul, 2, lambda b: b.float(), "bias is torch.float32, expected torch.float16 like x"),
    (int4_matmul, 2, lambda b: b.to("meta"), "bias is on meta, expected"),
    (int4_matmul, 3, lambda r: r[:1], r"residual has shape \[1, 16\], expected \[2, 16\]"),
    (int4_matmul, 3, lambda r: r[:, :15], r"residual has shape \[2, 15\], expected \[2, 16\]"),
    (int4_matmul, 3, lambda r: r[None], r"residual has shape \[1, 2, 16\], expected \[2, 16\]"),
    (int4_matmul, 3, lambda r: r.float(), "residual is torch.float32, expected torch.float16 like x"),
    (int4_matmul, 3, lambda r: r.to("meta"), "residual is on meta, expected"),
    (int4_swiglu, 0, lambda x: x[:, :120], r"x has 120 columns, but gate is \[16, 128\]"),
    (int4_swiglu, 1, leaf(zeros=lambda z: z[:, 1:]), r"gate.zeros has shape \[2, 15\]"),
    (int4_swiglu, 2, leaf(qweight=lambda q: q.to("meta")), "up.qweight is on meta"),
    (int4_swiglu, 2, leaf(rounding="fma"), r"up is .* rounding 'fma', expected .* rounding 'sub', like gate"),
    (int4_swiglu, 2, lambda _: drawn(int4_matmul, G=1, group=128)[1], "up is .* of 128, .* expected .* of 64"),
    (int4_swiglu, 2, lambda _: drawn(int4_matmul, n=32)[1], r"up is \[32, 128\] .* expected \[16, 128\]"),
]


@pytest.mark.parametrize("op, place, change, message", REFUSED, ids=[case[3] for case in REFUSED])
def test_invalid_arguments_are_refused_for_every_implementation(op: Op, place: int, change: Any, message: str) -> None:
    args = drawn(op)
    args[place] = change(args[place])
    for name in op.impls:
        with use(**{op.name: name}), count_calls() as ran, nothing_launched(), pytest.raises(ValueError, match=message):
            op(*args)
        assert not ran


@KERNELS
def test_float64_is_refused_before_a_launch(op: Op, impl: Impl) -> None:
    """Of x, and of scales and zeros, in which a kernel loads them."""
    message = "torch.float64 .* torch.float32, torch.float16, torch.bfloat16"
    x, *rest = drawn(op, dtype="float32")
    wider = (lambda w: replace(w, scales=w.scales.double())), (lambda w: replace(w, zeros=w.zeros.double()))
    calls = [(x.double(), *(y.double() if isinstance(y, Tensor) else y for y in rest))]
    calls += [(x, *(change(y) if isinstance(y, Int4) else y for y in rest)) for change in wider]
    for args in calls:
        with use(**{op.name: impl.name}), nothing_launched(), pytest.raises(Unsupported, match=message):
            op(*args)


@KERNELS
@pytest.mark.parametrize("G, group", [(4, 16), (3, 48), (2, 80), (2, 96)])
def test_groups_that_cut_a_tile_work_or_are_refused_before_a_launch(op: Op, impl: Impl, G: int, group: int) -> None:
    args = tuple(drawn(op, G=G, group=group))
    if impl.name == "naive":
        return assert_matches_reference(op, impl, impl.configs[0], args)
    message = f"the group is {group}, but 32, multiples of 64 and all of k are served"
    with use(**{op.name: impl.name}), nothing_launched(), pytest.raises(Unsupported, match=message):
        op(*args)


@EACH_IMPL
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (), (2, 1)], ids=str)
def test_x_of_any_leading_axes_gives_their_shape(op: Op, impl: Impl, shape: tuple[int, ...]) -> None:
    """None too, or none of a length above 0."""
    args = drawn(op)
    x = args[0]

    def rows(f: Callable[[Tensor], Tensor]) -> list[Any]:
        """The arguments with f of x and of the residual, if there is one."""
        return [f(y) if i in (0, 3) else y for i, y in enumerate(args)]

    with use(**{op.name: impl.name}):
        want, found = op(*rows(lambda y: y[:1])), op(*rows(lambda y: y[0].expand(*shape, -1)))
    assert found.shape == (*shape, 16) and found.dtype == x.dtype and found.is_contiguous()
    assert torch.equal(found, want[0].expand(*shape, -1)) or not impl.batch_invariant


@EACH_IMPL
def test_weight_without_rows_gives_an_empty_result(op: Op, impl: Impl) -> None:
    with use(**{op.name: impl.name}), nothing_launched():
        assert op(*drawn(op, n=0)).shape == (2, 0)


@EACH_IMPL
def test_noncontiguous_arguments_give_the_same_result(op: Op, impl: Impl) -> None:
    """x, bias and each leaf, turned or with gaps; and scales of another dtype than x, which are rounded to it."""

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else torch.stack((x, -x), 1)[:, 0]

    def changed(y: Any) -> Any:
        return leaf(qweight=turned, scales=turned, zeros=turned)(y) if isinstance(y, Int4) else turned(y)

    args = drawn(op)
    assert_matches_reference(op, impl, impl.configs[0], tuple(changed(y) for y in args))
    wide = [leaf(scales=Tensor.float)(y) if isinstance(y, Int4) else y for y in args]
    with use(**{op.name: impl.name}):
        assert torch.equal(op(*wide), op(*args))


def test_weight_views_of_the_same_memory_are_packed_separately() -> None:
    """The library's packed copy, kept beside a weight, is not taken for one of other strides, or in other groups."""
    x, w, *_ = drawn(int4_matmul, G=2, group=32)
    aten = OPS["int4_matmul"].impls["aten"]
    one = replace(w, scales=w.scales[:1].expand(2, -1))
    half = replace(w, scales=w.scales[:1], zeros=w.zeros[:1])
    whole = replace(half, group_size=64)
    for y in (w, one, half, whole, w):
        assert_matches_reference(
            int4_matmul, int4_matmul.impls["blocked"], {"BLOCK_N": 32}, (x[:, : y.shape[1]], y, None)
        )
        want = aten(x[:, : y.shape[1]], replace(y, qweight=y.qweight.clone()))
        assert torch.equal(aten(x[:, : y.shape[1]], y), want)


@pytest.mark.parametrize(
    ("group", "num_groups", "requested", "block_k"),
    [(32, 8, 128, 64), (64, 4, 128, 64), (128, 4, 64, 64), (256, 2, 128, 128), (192, 2, 128, 64), (320, 1, 128, 128)],
)
def test_steps_lie_in_one_group_and_are_no_longer_than_requested(
    group: int, num_groups: int, requested: int, block_k: int
) -> None:
    w = drawn(int4_matmul, G=num_groups, group=group)[1]
    assert fit_block_k(requested, w) == block_k
