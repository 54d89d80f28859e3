"""The hard cases of ops: what each is named for is in its arguments, and the reference itself is right for it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.correctness.error_budget import assert_matches_reference, example_args, shape_and_dtype
from bench.correctness.guarded_memory import same_bits, tensors
from vila_triton import ops
from vila_triton.ops import Int4, dequantize
from vila_triton.registry import OPS, REFERENCE, IntRange, Op, discover

discover()
LARGEST_HALF = torch.finfo(torch.float16).max
INT4_SIZES = [(op, {"m": 3, "G": G, "group": 32}) for op in (ops.int4_matmul, ops.int4_swiglu) for G in (1, 3, 200)]
CASES = pytest.mark.parametrize(
    "op, name", [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS.values() for name in op.hard_cases]
)


def sizes_of(op: Op, at: str) -> dict:
    """The sizes at one end of the domain, "low" or "high", in float16."""
    ends = {n: getattr(d, at) if isinstance(d, IntRange) else d.values[0] for n, d in op.domain.items()}
    return {**ends, "dtype": "float16"}


@pytest.mark.on_gpu
@pytest.mark.parametrize("at", ["low", "high"])
@CASES
def test_the_reference_is_right_for_arguments_of_the_same_shapes(op: Op, name: str, at: str) -> None:
    sizes = sizes_of(op, at)
    random, args = example_args(op, 0, **sizes), example_args(op, 0, **sizes, values=name)
    assert list(map(shape_and_dtype, tensors(args))) == list(map(shape_and_dtype, tensors(random)))
    assert at == "low" or not all(map(same_bits, tensors(args), tensors(random)))
    assert_matches_reference(op, op.impls[REFERENCE], {}, args)


def drawn(op: Op, values: str, **sizes: Any) -> tuple:
    return example_args(op, 0, **{**sizes_of(op, "high"), **sizes}, values=values)


@pytest.mark.parametrize("op, sizes", [(ops.linear, {"k": 20}), (ops.linear, {"m": 3, "k": 4000}), *INT4_SIZES])
def test_sums_exceed_float16_and_cancel(op: Op, sizes: dict[str, int]) -> None:
    x, *weights = drawn(op, "cancelling_sums", **sizes)
    w = weights[-1] if op is ops.int4_swiglu else weights[0]
    w = dequantize(w, torch.float32) if isinstance(w, Int4) else w
    products = x.double()[:, None] * w.double()  # [m, n, k]
    assert products.cumsum(-1).abs().amax(-1).min() > LARGEST_HALF / 2  # scales differ from row to row
    assert products.cumsum(-1).abs().max() > 2 * LARGEST_HALF
    assert products.sum(-1).abs().max() < LARGEST_HALF


@pytest.mark.parametrize("op", [ops.int4_matmul, ops.int4_swiglu], ids=lambda op: op.name)
def test_groups_are_unlike_and_all_count(op: Op) -> None:
    x, *weights = drawn(op, "unlike_groups", G=100, n=20)
    for w in weights[: 1 if op is ops.int4_matmul else 2]:
        for distance in (1, 2, 4, 8, 16, 32, 64):
            ratios = w.scales[distance:] / w.scales[:-distance]
            assert (ratios.log2().abs() > 0.3).all() and ratios.log2().abs().max() > 2
            assert (w.zeros[distance:] != w.zeros[:-distance]).all()
        products = x.double()[:, None] * dequantize(w, torch.float16).double()
        sums = products.unflatten(-1, (100, -1)).sum(-1).square().mean((0, 1)).sqrt()  # of each group
        assert sums.max() < 5 * sums.min()


def scores_and_values(values: str) -> tuple[Tensor, Tensor]:
    """The scores [h, t] of one query, and the values [t, d] of its only KV head."""
    q, cache, lens, scale = drawn(ops.decode_attention, values, b=1, g=1, t=100, dtype="float32")
    k, v = cache.gather(0, int(lens))
    return q[0] @ k[:, 0].t() * scale, v[:, 0]


def test_scores_rise_fall_are_equal_and_far_below_0() -> None:
    rising, falling = (scores_and_values(name)[0] for name in ("rising_scores", "falling_scores"))
    assert (rising[:, 16:] > rising[:, :-16]).all() and (falling[:, 16:] < falling[:, :-16]).all()
    assert scores_and_values("equal_scores")[0].std(-1).max() < 1e-5
    assert scores_and_values("negative_scores")[0].exp().max() == 0


def test_value_of_small_weight_is_far() -> None:
    scores, v = scores_and_values("far_value")
    size, weights = v.abs().mean(-1), scores.softmax(-1)
    far = int(size.argmax())
    assert size[far] > 300 * size.median() and 1e-5 < weights[:, far].max() < 0.05
    assert (weights[:, far] * size[far]).max() > 0.1


def test_lengths_are_uneven() -> None:
    _, _, lens, _ = drawn(ops.decode_attention, "uneven_lengths", b=4)
    assert lens[0] == 100 and lens[1] == 0 and lens[2] <= 1
    _, _, _, _, batch, _ = drawn(ops.prefill_attention, "uneven_lengths", b=3)
    assert batch.query_start_loc.diff().tolist()[1] == 0 and batch.context_lens[2] == 0


def test_a_name_is_registered_once() -> None:
    op = Op(lambda x: x, bitwise_exact=False)
    op.hard_case("zeros")(lambda args, rng: args)
    for name in ("zeros", "random"):
        with pytest.raises(ValueError, match=f"already are example arguments that are called '{name}'"):
            op.hard_case(name)(lambda args, rng: args)
    with pytest.raises(KeyError):
        example_args(OPS["rms_norm"], 0, **sizes_of(OPS["rms_norm"], "low"), values="unknown")
