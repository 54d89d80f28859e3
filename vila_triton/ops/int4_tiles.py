"""The native int4 layout: the 4-bit codes of a weight [n, k] in tiles that tensor cores read directly.

`pack_tiles` makes [ceil(n/16), ceil(k/64), 32, 4] int32 words. A tile is 16 outputs by 64 inputs, in the order in which
the threads of a warp hold the 16 x 16 operand of a tensor-core product (PTX ISA, mma.m16n8k16, fragment A). A thread
multiplies what it loads, without a trip through shared memory:

    lane = 4 r + c             r = 0..7, c = 0..3: the thread of the warp
    word = 0..3                one 16 x 16 block of the tile each; the four words of a lane are one 16-byte load
    nibble:  0  4              (row r,     inputs 2c, 2c + 1)            row and input within the 16 x 16 block
             1  5              (row r + 8, inputs 2c, 2c + 1)
             2  6              (row r,     inputs 2c + 8, 2c + 9)
             3  7              (row r + 8, inputs 2c + 8, 2c + 9)

The two codes of a line are 16 bits apart. One `(word >> 4 i) & 0x000f000f | 0x64006400` therefore turns both into the
float16 numbers 1024 + code, side by side in one register as the product wants them.
"""

import torch
from einops import rearrange
from torch import Tensor

CODES_PER_WORD = 8  # 4-bit codes in one int32 word
TILE_N, TILE_K = 16, 64


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """Pack eight codes into an int32 word, the first in the lowest bits: [..., 8] -> [...]."""
    shifts = torch.arange(0, 32, 4, device=nibbles.device, dtype=torch.int64)
    return (nibbles.long() << shifts).sum(-1).to(torch.uint32).view(torch.int32)  # 0 to 2³² - 1


def unpack_nibbles(words: Tensor) -> Tensor:
    """Unpack int32 words into eight int32 codes each, the lowest bits first: [...] -> [..., 8]."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return (words[..., None] >> shifts) & 0xF


def tiled_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """The shape of the packed tensor of n x k codes."""
    return -(-n // TILE_N), -(-k // TILE_K), 32, 4


def pack_tiles(codes: Tensor) -> Tensor:
    """Pack codes [n, k] into tiles [ceil(n/16), ceil(k/64), 32, 4] int32. Beyond n and k they hold code 0."""
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -k % TILE_K, 0, -n % TILE_N))
    pattern = "(i half r) (j word side c pair) -> i j (r c) word (pair side half)"
    return pack_nibbles(rearrange(codes, pattern, half=2, r=8, word=4, side=2, c=4, pair=2))


def unpack_tiles(packed: Tensor, n: int, k: int) -> Tensor:
    """Unpack tiles [ceil(n/16), ceil(k/64), 32, 4] int32 into codes [n, k] int32."""
    pattern = "i j (r c) word (pair side half) -> (i half r) (j word side c pair)"
    return rearrange(unpack_nibbles(packed), pattern, r=8, c=4, pair=2, side=2, half=2)[:n, :k]
