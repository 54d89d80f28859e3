"""`Int4`: dequantizing with both roundings, and quantizing by rounding to nearest."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vila_triton.ops import Int4, dequantize
from vila_triton.ops.int4_tiles import pack_tiles
from vila_triton.ops.int4_weight import unpack_codes

D = torch.float64
GROUPS = st.tuples(st.integers(1, 4), st.sampled_from([16, 32, 48])) | st.tuples(st.just(1), st.sampled_from([8, 24]))


@given(st.integers(1, 40), GROUPS, st.integers(0, 2**16))
def test_dequantize_is_codes_less_zeros_times_scales(n: int, groups: tuple[int, int], seed: int) -> None:
    (G, group), rng = groups, torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, G * group), generator=rng, dtype=torch.int32)
    scales, zeros = torch.rand(G, n, generator=rng), torch.randint(0, 16, (G, n), generator=rng).float()
    w = Int4(pack_tiles(q), scales, zeros, group)
    assert w.shape == (n, G * group) and torch.equal(unpack_codes(w), q)
    i, j = torch.arange(n)[:, None], torch.arange(G * group)[None] // group
    exact = (q.double() - zeros[j, i].double()) * scales[j, i].double()  # nothing is rounded: scales are float32
    assert torch.equal(dequantize(w, D), exact)
    assert torch.equal(dequantize(replace(w, rounding="fma"), D), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sub_and_fma_round_as_documented(dtype: torch.dtype) -> None:
    """Every code with every zero: in float64 all products and sums are exact, so that each rounding can be seen."""
    q, zeros = torch.arange(16).repeat(16)[None], torch.arange(16).repeat_interleave(16)[None]
    scales = torch.rand(1, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = Int4(pack_tiles(q.t().expand(-1, 16)), scales, zeros.to(dtype), 16)
    sub = ((q - zeros) * scales.to(D)).to(dtype)
    fma = (q * scales.to(D) - (zeros * scales.to(D)).to(dtype).to(D)).to(dtype)
    assert torch.equal(dequantize(w, dtype), sub.t().expand(-1, 16))
    assert torch.equal(dequantize(replace(w, rounding="fma"), dtype), fma.t().expand(-1, 16))
    assert not torch.equal(sub, fma)


@given(GROUPS, st.floats(-3, 3), st.integers(0, 2**16))
def test_pack_takes_the_nearest_of_16_levels_and_keeps_0(groups: tuple[int, int], shift: float, seed: int) -> None:
    G, group = groups
    w = torch.randn(3, G * group, generator=torch.Generator().manual_seed(seed)) + shift
    packed = Int4.pack(w, group)
    scales, zeros = (x.t().repeat_interleave(group, dim=1)[..., None] for x in (packed.scales, packed.zeros))
    levels = (torch.arange(16) - zeros) * scales  # [n, k, 16]
    error = (dequantize(packed, torch.float32) - w).abs()
    assert (error <= (levels - w[..., None]).abs().amin(-1) + 1e-6).all()
    assert (error <= scales[..., 0] * 0.501).all()  # the levels cover the range of a group
    assert (levels == 0).any(-1).all() and not dequantize(Int4.pack(0 * w, group), torch.float32).any()


@pytest.mark.parametrize("k, group", [(12, 12), (16, 12), (16, 0), (16, -16), (32, 8), (72, 24)], ids=str)
def test_weights_that_cannot_be_grouped_are_refused(k: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} and group_size = {group}"):
        Int4.pack(torch.ones(2, k), group)


def test_weights_with_nan_or_infinity_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Int4.pack(torch.full((1, 8), float("nan")), 8)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(2, 3, 32), r"Int4.pack: weight has shape \[2, 3, 32\], expected \[n, k\]"),
        (torch.ones(2, 32, dtype=torch.int32), "Int4.pack: weight is torch.int32, expected a floating-point dtype"),
        (torch.full((2, 32), float("inf")), "holds NaN or infinity"),
    ],
)
def test_what_is_no_weight_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4.pack(weight, 32)


def test_packing_a_parameter_keeps_no_graph_and_meta_tensors_have_its_shapes() -> None:
    weight = torch.nn.Parameter(torch.randn(20, 96, dtype=torch.float16))
    real, planned = Int4.pack(weight, 48), Int4.pack(weight.to("meta"), 48)
    for name in ("qweight", "scales", "zeros"):
        x, y = getattr(real, name), getattr(planned, name)
        assert not x.requires_grad and y.is_meta and (x.shape, x.dtype) == (y.shape, y.dtype)


@given(GROUPS, st.sampled_from([torch.uint8, torch.int32, torch.int64]), st.booleans(), st.integers(0, 2**16))
def test_codes_of_another_quantizer_are_kept(
    groups: tuple[int, int], dtype: torch.dtype, integer_zeros: bool, seed: int
) -> None:
    G, group = groups
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (5, G * group), generator=rng)
    zeros = torch.randint(16, (G, 5), generator=rng)
    scales = torch.rand(G, 5, generator=rng)
    w = Int4.from_codes(codes.to(dtype), scales, zeros.to(dtype) if integer_zeros else zeros.float())
    assert (w.group_size, w.zeros.dtype) == (group, scales.dtype) and torch.equal(unpack_codes(w), codes.int())
    zero, scale = (x.t().double().repeat_interleave(group, 1) for x in (zeros, scales))  # [n, k]
    assert torch.equal(dequantize(w, D), (codes - zero) * scale)


CODES, SCALES, ZEROS = torch.zeros(2, 64, dtype=torch.int64), torch.ones(2, 2), torch.zeros(2, 2)


@pytest.mark.parametrize(
    "args, message",
    [
        ((CODES + 16, SCALES, ZEROS), "codes are not all whole numbers from 0 to 15"),
        ((CODES - 1, SCALES, ZEROS), "codes are not"),
        ((CODES, SCALES, ZEROS + 0.5), "zeros are not all whole numbers from 0 to 15"),
        ((CODES, SCALES, ZEROS.log()), "zeros are not"),
        ((CODES, SCALES / 0, ZEROS), "scales hold NaN or infinity"),
        ((CODES, SCALES.long(), ZEROS), "scales is torch.int64, expected a floating-point dtype"),
        ((CODES, SCALES[:, :1], ZEROS), r"scales has shape \[2, 1\], expected \[G, n=2\]"),
        ((CODES, SCALES.new_ones(3, 2), SCALES.new_zeros(3, 2)), "3 rows of scales do not divide k = 64"),
        ((CODES, SCALES.new_ones(0, 2), SCALES.new_zeros(0, 2)), "0 rows of scales do not divide"),
        ((CODES, SCALES.new_ones(8, 2), SCALES.new_zeros(8, 2)), "k = 64 and group_size = 8"),
        ((CODES, SCALES, ZEROS, "nearest"), "rounding is 'nearest', expected one of sub, fma"),
    ],
    ids=str,
)
def test_codes_that_are_no_weight_are_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4.from_codes(*args)
