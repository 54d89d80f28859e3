"""The int4 leaf type: what a weight of codes, zeros and scales means in both orders of rounding, and making one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vila_triton.ops import Int4, dequantize, quantize_rtn
from vila_triton.ops.int4 import unpack_codes
from vila_triton.ops.int4_tiles import pack_tiles

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
def test_quantize_rtn_takes_the_nearest_of_16_levels_and_keeps_0(
    groups: tuple[int, int], shift: float, seed: int
) -> None:
    G, group = groups
    w = torch.randn(3, G * group, generator=torch.Generator().manual_seed(seed)) + shift
    packed = quantize_rtn(w, group)
    scales, zeros = (x.t().repeat_interleave(group, dim=1)[..., None] for x in (packed.scales, packed.zeros))
    levels = (torch.arange(16) - zeros) * scales  # [n, k, 16]
    error = (dequantize(packed, torch.float32) - w).abs()
    assert (error <= (levels - w[..., None]).abs().amin(-1) + 1e-6).all()
    assert (error <= scales[..., 0] * 0.501).all()  # the levels cover the range of a group
    assert (levels == 0).any(-1).all() and not dequantize(quantize_rtn(0 * w, group), torch.float32).any()


@pytest.mark.parametrize("k, group", [(12, 12), (16, 12), (16, 0), (16, -16), (32, 8), (72, 24)], ids=str)
def test_weights_that_cannot_be_grouped_are_refused(k: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} and group_size = {group}"):
        quantize_rtn(torch.ones(2, k), group)


def test_weights_with_nan_or_infinity_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quantize_rtn(torch.full((1, 8), float("nan")), 8)
