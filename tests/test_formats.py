"""Layouts of 4-bit codes: golden words, and every code back from every layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vila_triton import formats

LAYOUTS = {  # name -> pack, unpack, what n and k must be multiples of
    "tiles": (formats.pack_tiles, None, 1, 1),
    "rows": (formats.pack_rows, formats.unpack_rows, 1, 8),
    "gemm": (formats.pack_gemm, formats.unpack_gemm, 8, 1),
    "v2": (formats.pack_v2, formats.unpack_v2, 4, 64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(n=st.integers(1, 9), k=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_code_comes_back(layout: str, n: int, k: int, seed: int) -> None:
    pack, unpack, step_n, step_k = LAYOUTS[layout]
    q = torch.randint(0, 16, (n * step_n, k * step_k), generator=torch.Generator().manual_seed(seed))
    q.view(-1)[: min(16, q.numel())] = torch.arange(min(16, q.numel()))
    back = unpack(pack(q)) if unpack else formats.unpack_tiles(pack(q), *q.shape)
    assert torch.equal(back, q.int())


def test_golden_words() -> None:
    eight = torch.arange(8)
    assert formats.pack_rows(eight[None]).tolist() == [[0x76543210]]
    assert formats.pack_gemm(eight[:, None]).tolist() == [[0x75316420]]
    assert formats.pack_gemm(eight[:, None] + 8).tolist() == [[-38146904]]


def test_golden_halfwords_of_v2() -> None:
    n, k = torch.arange(4)[:, None], torch.arange(64)[None]
    x = formats.pack_v2((7 * n + 5 * k + 3 * (k // 8)) % 16).view(torch.uint16).int()
    first = "16b0 6b05 b05a 05af 5af4 af49 f49e 49e3 d27c 27c1 7c16 c16b 16b0 6b05 b05a 05af 8d27 d27c 27c1 7c16"
    assert [f"{h:04x}" for h in x[0, :20].tolist()] == first.split()
    assert x[0, 63] == 0x5AF4 and x.sum() == 2027488


def test_rows_that_v2_stores() -> None:
    assert [formats.v2_rows(k, 128) for k in (2560, 6912, 11008, 4096)] == [24, 56, 88, 32]
    assert formats.v2_rows(512, 64) == 16 and formats.v2_rows(512, 32) == 32
    with pytest.raises(ValueError, match="no groups of 48"):
        formats.v2_rows(480, 48)


def test_a_word_of_a_tile_is_a_lanes_share_of_the_operand() -> None:
    """Straight from the PTX ISA: a0..a7 of lane 4r + c, and the order of nibbles that the docstring draws."""
    q = torch.randint(0, 16, (16, 64), generator=torch.Generator().manual_seed(0))
    tile = formats.pack_tiles(q)[0, 0]
    for lane in range(32):
        r, c = divmod(lane, 4)
        for word in range(4):
            block = q[:, 16 * word : 16 * word + 16]
            pairs = [(r, 2 * c), (r + 8, 2 * c), (r, 2 * c + 8), (r + 8, 2 * c + 8)]
            for i, (row, column) in enumerate(pairs):
                held = int(tile[lane, word])
                assert (held >> 4 * i) & 0xF == block[row, column]
                assert (held >> 4 * (i + 4)) & 0xF == block[row, column + 1]
