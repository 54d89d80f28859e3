"""Calls of ops with millions of rows, of which the last ones are those of a small call: for what kernels take to be
contiguous, which no strides put beyond 2³¹ elements.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from far_memory import FarMemory
from torch import Tensor

from bench.correctness.error_budget import DEVICE, argument_names, example_args
from bench.correctness.guarded_memory import map_tensors
from vila_triton.ops.int4_tiles import TILE_K, TILE_N
from vila_triton.registry import Impl, Op

Arguments = tuple[Any, ...]
COLUMNS = 9  # of the small products: one block of rows of w, and a part of one


def map_named(op: Op, args: Arguments, fn: Callable[[str, Tensor], Tensor]) -> Arguments:
    """The arguments with fn(name, x) for each tensor x."""
    names = iter(argument_names(op, args))
    return map_tensors(lambda x: fn(next(names), x), args)


@dataclass
class Lengthened:
    """A call, the same one with more rows in front, and so many first and last programs of its grids to run."""

    args: Arguments
    longer_args: Arguments
    options: Mapping[str, Any]
    first: int
    last: int


def lengthen(op: Op, args: Arguments, more: Mapping[str, tuple[int, int]], far: FarMemory) -> Arguments:
    """The arguments with `more` rows of zeros in front: an axis and their number, by the name of an argument."""

    def longer(name: str, x: Tensor) -> Tensor:
        return far.lengthen(x, *more[name]) if name in more else x.clone()

    return map_named(op, args, longer)


def longer_products(op: Op, impl: Impl, config: Mapping[str, Any], far: FarMemory) -> Iterator[Lengthened]:
    """More rows of w, 2³⁰ of every kind and 2³² of one; and of x where a residual is added to the result, or where k is
    split, so that sums are far apart.
    """

    def columns(count: int) -> dict[str, tuple[int, int]]:
        more = {"w": (0, count), "bias": (0, count), "residual": (1, count)}
        for w in ("w", "gate", "up"):
            more |= {f"{w}.qweight": (0, count // TILE_N), f"{w}.scales": (1, count), f"{w}.zeros": (1, count)}
        return more

    def rows(count: int) -> dict[str, tuple[int, int]]:
        return {"x": (0, count), "residual": (0, count)}

    residual = "residual" in op.domain and impl.name != "dequant"  # whose product is torch's
    whole, split = ({"SPLIT_K": n} if "SPLIT_K" in config else {} for n in (1, 4))
    kinds = [{"group": 64, "order": "sub"}, {"group": 32, "order": "sub"}, {"group": 64, "order": "fma"}]
    calls = [(kind, columns(2**30), whole) for kind in kinds] + [({}, columns(2**32), whole)]
    calls += [({}, rows(2**28), whole)] if residual else []
    if split:
        calls += [({"G": 12}, more, split) for more in (rows(2**27), rows(2**30), columns(2**32))]
    for chosen, more, splits in calls:
        sizes = {"m": 1, "n": COLUMNS, "k": 70, "G": 3, "dtype": "float16", "bias": True} | kinds[0] | chosen
        sizes["residual"] = residual
        args = example_args(op, 0, **{name: sizes[name] for name in op.domain})
        last = 3 if impl.name == "dequant" else 1  # the programs of the last rows of w
        yield Lengthened(args, lengthen(op, args, more, far), {"config": {**config, **splits}}, 0, last)


def longer_decodes(op: Op, impl: Impl, config: Mapping[str, Any], far: FarMemory) -> Iterator[Lengthened]:
    """2²⁸ more sequences in one split; and 32 more in two, where the block table has room for 2²³."""
    sizes = {"g": 1, "ratio": 8, "l": 16, "dtype": "float16", "kv": "plain", "numerics": "batch_invariant"}
    options = {"config": config, "return_lse": True}

    def longer(args: Arguments, count: int) -> Arguments:
        return lengthen(op, args, {name: (0, count) for name in ("q", "seq_lens", "cache.block_table")}, far)

    args = example_args(op, 0, **sizes, b=3, t=40, d=16)
    yield Lengthened(args, longer(args, 2**28), options, 0, 3)
    args = example_args(op, 0, **sizes, b=1, t=300, d=64)
    q, cache, *others = longer(args, 32)
    table = far.empty((33, 2**27), torch.int32)
    table[:, : cache.block_table.shape[1]] = cache.block_table
    yield Lengthened(args, (q, replace(cache, block_table=table), *others), options, 66, 8)


def longer_prefills(op: Op, impl: Impl, config: Mapping[str, Any], far: FarMemory) -> Iterator[Lengthened]:
    """Two more sequences, of 2²⁷ new tokens each."""
    sizes = {"b": 3, "s": 1, "t": 20, "g": 1, "ratio": 8, "d": 16, "l": 16, "dtype": "float16", "kv": "plain"}
    args = example_args(op, 0, **sizes, numerics="fast")
    more = {name: (0, 2**28) for name in "qkv"}
    more |= {name: (0, 2) for name in ("cache.block_table", "batch.query_start_loc", "batch.context_lens")}
    longer_args = lengthen(op, args, more, far)
    longer_args[4].query_start_loc[1:] += torch.tensor([2**27, *[2**28] * 4], device=DEVICE)
    yield Lengthened(args, longer_args, {"config": config, "return_lse": True}, 4, 4)


def longer_gradients(op: Op, impl: Impl, config: Mapping[str, Any], far: FarMemory) -> Iterator[Lengthened]:
    """2³³ more columns of w, and so of the gradient."""
    for group, order in ((64, "sub"), (32, "sub"), (64, "fma")):
        args = example_args(op, 0, m=1, n=40, G=3, group=group, dtype="float16", order=order)
        more = {"w.qweight": (1, 2**33 // TILE_K), "w.scales": (0, 2**33 // group), "w.zeros": (0, 2**33 // group)}
        yield Lengthened(args, lengthen(op, args, more, far), {"config": config}, 0, 3)


LONGER = {
    "int4_matmul_backward": longer_gradients,
    "linear": longer_products,
    "int4_matmul": longer_products,
    "int4_swiglu": longer_products,
    "decode_attention": longer_decodes,
    "prefill_attention": longer_prefills,
}
