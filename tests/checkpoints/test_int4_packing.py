"""Packings of 4-bit codes: known words, and lossless round trips of every code."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vila_triton.checkpoints import int4_packing
from vila_triton.ops import int4_tiles


@dataclass(frozen=True)
class Layout:
    """A layout, and what n and k must be multiples of in it."""

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    n: int
    k: int


LAYOUTS = {
    "tiles": Layout(int4_tiles.pack_tiles, int4_tiles.unpack_tiles, 1, 1),
    "rows": Layout(int4_packing.pack_awq_gemv, lambda x, n, k: int4_packing.unpack_awq_gemv(x), 1, 8),
    "gemm": Layout(int4_packing.pack_awq_gemm, lambda x, n, k: int4_packing.unpack_awq_gemm(x), 8, 1),
    "v2": Layout(int4_packing.pack_awq_v2, lambda x, n, k: int4_packing.unpack_awq_v2(x), 4, 64),
}
TILES = LAYOUTS["tiles"]


def random(n: int, k: int, seed: int = 0) -> Tensor:
    """Random codes [n, k], the first 16 of which are all different."""
    q = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    q.view(-1)[:16] = torch.arange(16)[: q.numel()]
    return q


@pytest.mark.parametrize("layout", LAYOUTS)
@given(n=st.integers(1, 9), k=st.integers(1, 9), seed=st.integers(0, 99))
def test_packing_round_trips_every_code_at_every_position(layout: str, n: int, k: int, seed: int) -> None:
    """Adding 1 sixteen times takes each position through all codes."""
    x = LAYOUTS[layout]
    q = random(n * x.n, k * x.k, seed)
    for code in range(16):
        added = (q + code) % 16
        assert torch.equal(x.unpack(x.pack(added), *q.shape), added)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tiles"])
def test_repacking_between_layouts_is_lossless(layout: str) -> None:
    """At every shape that the other layout has, up to more than two native tiles either way."""
    x = LAYOUTS[layout]
    for n, k in product(range(x.n, 42, x.n), range(x.k, 193, x.k)):
        theirs = x.pack(random(n, k))
        ours = TILES.pack(x.unpack(theirs, n, k))
        assert ours.shape == int4_tiles.tiled_shape(n, k) and ours.dtype == torch.int32
        back = x.pack(TILES.unpack(ours, n, k))
        assert back.dtype == theirs.dtype and torch.equal(back, theirs), (n, k)
        assert torch.equal(TILES.pack(x.unpack(back, n, k)), ours), (n, k)


@given(n=st.integers(1, 40), k=st.integers(1, 140))
def test_tile_padding_holds_code_zero(n: int, k: int) -> None:
    whole = TILES.unpack(TILES.pack(random(n, k) | 1), *(16 * -(-n // 16), 64 * -(-k // 64)))
    assert whole[:n, :k].all() and not whole[n:].any() and not whole[:, k:].any()


def test_packing_of_known_codes() -> None:
    eight = torch.arange(8)
    assert int4_packing.pack_awq_gemv(eight[None]).tolist() == [[0x76543210]]
    assert int4_packing.pack_awq_gemm(eight[:, None]).tolist() == [[0x75316420]]
    assert int4_packing.pack_awq_gemm(eight[:, None] + 8).tolist() == [[-38146904]]
    rows = torch.arange(64).view(2, 32) * 5 % 16
    for i in range(8):  # nibble i of word c of a row is its code 8c + i
        assert torch.equal(int4_packing.pack_awq_gemv(rows) >> 4 * i & 15, rows[:, i::8].int())


def test_awq_v2_packs_known_halfwords() -> None:
    n, k = torch.arange(4)[:, None], torch.arange(64)[None]
    x = int4_packing.pack_awq_v2((7 * n + 5 * k + 3 * (k // 8)) % 16).view(torch.uint16).int()
    first = "16b0 6b05 b05a 05af 5af4 af49 f49e 49e3 d27c 27c1 7c16 c16b 16b0 6b05 b05a 05af 8d27 d27c 27c1 7c16"
    assert [f"{h:04x}" for h in x[0, :20].tolist()] == first.split()
    assert x[0, 63] == 0x5AF4 and x.sum() == 2027488


def test_padded_scale_rows_of_awq_v2() -> None:
    assert [int4_packing.padded_scale_rows(k, 128) for k in (2560, 6912, 11008, 4096)] == [24, 56, 88, 32]
    assert int4_packing.padded_scale_rows(512, 64) == 16 and int4_packing.padded_scale_rows(512, 32) == 32
    with pytest.raises(ValueError, match="no groups of 48"):
        int4_packing.padded_scale_rows(480, 48)


def test_word_of_a_tile_holds_the_codes_of_an_mma_fragment() -> None:
    """From the PTX ISA: a0..a7 of lane 4r + c, and the order of nibbles in the module's docstring."""
    q = torch.randint(0, 16, (16, 64), generator=torch.Generator().manual_seed(0))
    tile = int4_tiles.pack_tiles(q)[0, 0]
    for lane in range(32):
        r, c = divmod(lane, 4)
        for word in range(4):
            block = q[:, 16 * word : 16 * word + 16]
            pairs = [(r, 2 * c), (r + 8, 2 * c), (r, 2 * c + 8), (r + 8, 2 * c + 8)]
            for i, (row, column) in enumerate(pairs):
                packed_word = int(tile[lane, word])
                assert (packed_word >> 4 * i) & 0xF == block[row, column]
                assert (packed_word >> 4 * (i + 4)) & 0xF == block[row, column + 1]
