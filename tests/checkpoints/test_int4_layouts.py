"""Layouts of int4 linears: lossless round trips, llm-awq's own packing, and what is refused."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from vila_triton.checkpoints.int4_layouts import (
    AWQ_GEMM,
    AWQ_V1,
    AWQ_V2,
    LAYOUTS,
    NATIVE,
    Layout,
    detect_layout,
    read_linear,
)
from vila_triton.checkpoints.int4_packing import padded_scale_rows
from vila_triton.ops import Int4, dequantize
from vila_triton.ops.int4_tiles import pack_tiles
from vila_triton.ops.int4_weight import unpack_codes

FOREIGN = {name: layout for name, layout in LAYOUTS.items() if layout is not NATIVE}


def weight(n: int, k: int, group: int, dtype: torch.dtype, seed: int = 0) -> Int4:
    """A weight with random codes and zeros, and scales over the usual range."""
    rng = torch.Generator().manual_seed(seed)
    scales = torch.exp2(torch.rand(k // group, n, generator=rng) * 12 - 16).to(dtype)
    zeros = torch.randint(0, 16, (k // group, n), generator=rng).to(dtype)
    return Int4(pack_tiles(torch.randint(0, 16, (n, k), generator=rng)), scales, zeros, group)


def same(a: Int4, b: Int4) -> bool:
    return a.group_size == b.group_size and all(
        map(torch.equal, (a.qweight, a.scales, a.zeros), (b.qweight, b.scales, b.zeros))
    )


sizes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.sampled_from([32, 64, 128]))
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


@pytest.mark.parametrize("layout", FOREIGN.values(), ids=FOREIGN)
@given(sizes, dtypes, st.integers(0, 99))
def test_layout_round_trip_is_lossless(layout: Layout, size: tuple, dtype: torch.dtype, seed: int) -> None:
    n8, G, group = size
    assume(layout is not AWQ_V2 or G * group % 64 == 0)
    w = weight(8 * n8, G * group, group, dtype, seed)
    leaves = layout.write(w)
    assert tuple(leaves) == layout.tensor_names or set(leaves) == set(layout.tensor_names)
    assert detect_layout(leaves) is layout and layout.read(leaves, 0).rounding == layout.rounding
    again = read_linear(leaves)
    assert same(again, w)
    assert all(torch.equal(x, y) for x, y in zip(leaves.values(), layout.write(again).values()))
    on_meta = layout.write(Int4(w.qweight.to("meta"), w.scales.to("meta"), w.zeros.to("meta"), group))
    assert {k: (x.shape, x.dtype) for k, x in on_meta.items()} == {k: (x.shape, x.dtype) for k, x in leaves.items()}
    back = layout.read(on_meta, 0)
    assert (back.qweight.shape, back.zeros.dtype) == (w.qweight.shape, dtype)


def test_repacking_blockwise_equals_repacking_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vila_triton.checkpoints import int4_layouts

    w = weight(88, 128, 32, torch.float16)
    whole = {name: layout.write(w) for name, layout in FOREIGN.items()}
    monkeypatch.setattr(int4_layouts, "CODES_PER_BLOCK", 128 * 40)  # 32 outputs at a time, then 24
    for name, layout in FOREIGN.items():
        assert all(torch.equal(x, y) for x, y in zip(whole[name].values(), layout.write(w).values()))
        assert same(layout.read(whole[name], 0), w)


@pytest.mark.parametrize("layout", FOREIGN.values(), ids=FOREIGN)
def test_dequantized_layouts_match_their_definition(layout: Layout) -> None:
    """Computed from the tensors alone, in the arithmetic of the layout's kernels."""
    w = weight(16, 256, 128, torch.float16)
    leaves, q = layout.write(w), unpack_codes(w).half()
    if layout is AWQ_V2:
        scales, shifts = (leaves[name][:2].T.repeat_interleave(128, 1).double() for name in layout.tensor_names[1:])
        dense = (q.double() * scales + shifts).half()
    else:
        scales = (leaves["scales"] if layout is AWQ_GEMM else leaves["scales"].T[:2]).T.repeat_interleave(128, 1)
        dense = (q - w.zeros.T.repeat_interleave(128, 1)) * scales
    assert torch.equal(dequantize(layout.read(leaves, 0), torch.float16), dense)


def test_awq_v2_matches_llm_awq_packing() -> None:
    """Padding rows are 0, a scaled zero is -(scale * float32(zero)) in float16, a zero of 0 becomes -0."""
    w = weight(8, 2560, 128, torch.float16)
    leaves = AWQ_V2.write(w)
    assert leaves["scales"].shape == leaves["scaled_zeros"].shape == (24, 8) == (padded_scale_rows(2560, 128), 8)
    assert not leaves["scales"][20:].any() and not leaves["scaled_zeros"][20:].any()
    expected = -(w.scales * w.zeros.float()).to(torch.float16)
    assert torch.equal(leaves["scaled_zeros"][:20].view(torch.int16), expected.view(torch.int16))
    fast = {"qweight": leaves["qweight"], "scales": leaves["scales"], "qzeros": leaves["scaled_zeros"]}
    assert detect_layout(fast) is AWQ_V2 and same(AWQ_V2.read(fast, 0), w)  # AutoAWQ's "gemv_fast"


def test_packing_of_known_codes() -> None:
    """Codes 0..7 are 0x75316420 across outputs (AutoAWQ "gemm") and 0x76543210 across inputs (llm-awq v1)."""
    q = torch.arange(8)[:, None].expand(8, 32)
    ones = torch.ones(1, 8, dtype=torch.float16)
    assert (AWQ_GEMM.write(Int4(pack_tiles(q), ones, ones, 32))["qweight"] == 0x75316420).all()
    q = torch.arange(8).repeat(8, 4)
    assert (AWQ_V1.write(Int4(pack_tiles(q), ones, ones, 32))["qweight"] == 0x76543210).all()


def edit(leaves: dict[str, Tensor], name: str, **changes: float) -> dict[str, Tensor]:
    leaves = {k: x.clone() for k, x in leaves.items()}
    for index, value in changes.items():
        leaves[name][int(index[1:])] = value
    return leaves


W = weight(16, 256, 64, torch.float16)
V2_LEAVES, GEMM_LEAVES, V1_LEAVES = AWQ_V2.write(W), AWQ_GEMM.write(W), AWQ_V1.write(W)
REFUSED_READS = {
    "a scaled zero between codes": (
        AWQ_V2,
        edit(V2_LEAVES, "scaled_zeros", _0=0.1),
        "16 of its scaled zeros are not -scale",
    ),
    "a scale of nan": (AWQ_V2, edit(V2_LEAVES, "scales", _1=float("nan")), "16 of its scaled zeros are not"),
    "scales in the padding": (AWQ_V2, edit(V2_LEAVES, "scales", _7=1), r"scales beyond the 4 .* are not zero"),
    "v1 zeros in the padding": (AWQ_V1, edit(V1_LEAVES, "qzeros", _0=-1), r"zeros beyond the 4 .* are not zero"),
    "a scale too few": (
        AWQ_V2,
        {**V2_LEAVES, **{k: V2_LEAVES[k][:9] for k in AWQ_V2.tensor_names[1:]}},
        "9 scales for 256 inputs fit",
    ),
    "outputs that differ": (AWQ_V2, {**V2_LEAVES, "scales": V2_LEAVES["scales"][:, :8]}, "are not one weight"),
    "other outputs": (AWQ_GEMM, {**GEMM_LEAVES, "scales": GEMM_LEAVES["scales"][:, :8]}, "are not one weight"),
    "groups of 8": (
        AWQ_GEMM,
        {**GEMM_LEAVES, "scales": torch.ones(32, 16).half(), "qzeros": torch.ones(32, 2).int()},
        "group_size",
    ),
    "v1 outputs": (AWQ_V1, {**V1_LEAVES, "scales": V1_LEAVES["scales"][:8]}, "are not one weight"),
    "ours in other groups": (NATIVE, NATIVE.write(W), "in groups of 48 are not one weight"),
}


@pytest.mark.parametrize("layout, leaves, message", REFUSED_READS.values(), ids=REFUSED_READS)
def test_tensors_of_mismatched_shapes_are_refused(layout: Layout, leaves: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.read(leaves, 48)


def changed(**changes: Tensor) -> Int4:
    return Int4(**{**{name: getattr(W, name) for name in ("qweight", "scales", "zeros", "group_size")}, **changes})


REFUSED_WRITES = {
    "groups of 256": (AWQ_V2, weight(16, 256, 256, torch.float16), "groups of 256: .* hold groups of 32, 64, 128"),
    "groups of 16": (AWQ_V1, weight(16, 256, 16, torch.float16), "groups of 16"),
    "k of 96": (AWQ_V2, weight(16, 96, 32, torch.float16), r"\[16, 96\]: .* multiples of 4 outputs and 64 inputs"),
    "n of 18": (AWQ_V2, weight(18, 128, 32, torch.float16), r"\[18, 128\]"),
    "n of 12": (AWQ_GEMM, weight(12, 128, 32, torch.float16), "12 outputs: AutoAWQ's layout holds a multiple of 8"),
    "half a zero": (AWQ_GEMM, changed(zeros=W.zeros + 0.5), "zeros are not all whole numbers from 0 to 15"),
    "a zero of 16": (AWQ_V2, changed(zeros=W.zeros + 16), "zeros are not all whole"),
    "no scale": (AWQ_V2, changed(scales=W.scales * 0), "a scale is 0"),
    "a large scale": (AWQ_V2, changed(scales=W.scales * 0 + 60000), "not finite"),
}


@pytest.mark.parametrize("layout, w, message", REFUSED_WRITES.values(), ids=REFUSED_WRITES)
def test_weight_that_a_layout_cannot_hold_is_refused(layout: Layout, w: Int4, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.write(w)


def test_unknown_tensor_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"qweight \[4, 64\], scales \[2, 4\] are of no layout .*awq-gemm"):
        detect_layout({"qweight": torch.zeros(4, 64), "scales": torch.zeros(2, 4)})
