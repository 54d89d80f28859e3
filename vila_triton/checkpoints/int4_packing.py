"""How 4-bit codes lie in memory: our tiles, and the three layouts AWQ checkpoints have had.

Every function goes between a packed tensor and the codes q [n, k] (0 to 15, any integer dtype in, int32 out; n outputs,
k inputs). A layout is a permutation and nothing else: packing and unpacking give every code back bit for bit.

Ours, `pack_tiles`: [n/16, k/64, 32, 4] int32, n and k rounded up. A tile is 16 outputs by 64 inputs, cut up as the
tensor cores' 16 x 16 operand is held in registers (PTX ISA, mma.m16n8k16, A fragment), so that what a thread loads is
what it multiplies, without a trip through shared memory:

    lane = 4 r + c             r = 0..7, c = 0..3:  the thread of a warp
    word = 0..3                one 16 x 16 block of the tile each; a lane's four words are one 16-byte load
    nibble:  0  4              (row r,     inputs 2c, 2c + 1)            row and input within the 16 x 16 block
             1  5              (row r + 8, inputs 2c, 2c + 1)
             2  6              (row r,     inputs 2c + 8, 2c + 9)
             3  7              (row r + 8, inputs 2c + 8, 2c + 9)

The two codes of a line are 16 bits apart, so one `(word >> 4 i) & 0x000f000f | 0x64006400` makes both of them the
float16 numbers 1024 + code, side by side in one register as the multiplication wants them.
"""

import torch
from einops import rearrange
from torch import Tensor

CODES_PER_WORD = 8  # 4-bit codes in one int32 word
TILE_N, TILE_K = 16, 64
AWQ_GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code is nibble i of a word


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """Eight codes along the last axis, the first in the lowest bits -> int32 words: [..., 8] -> [...]."""
    shifts = torch.arange(0, 32, 4, device=nibbles.device, dtype=torch.int64)
    return (nibbles.long() << shifts).sum(-1).to(torch.uint32).view(torch.int32)  # 0 to 2³² - 1


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 words -> their eight codes, the lowest bits first: [...] -> [..., 8] int32."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return (words[..., None] >> shifts) & 0xF


def tiled_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """The shape of n x k codes in our tiles."""
    return -(-n // TILE_N), -(-k // TILE_K), 32, 4


def pack_tiles(codes: Tensor) -> Tensor:
    """Codes [n, k] -> [ceil(n/16), ceil(k/64), 32, 4] int32; what lies beyond n and k is code 0."""
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -k % TILE_K, 0, -n % TILE_N))
    pattern = "(i half r) (j word side c pair) -> i j (r c) word (pair side half)"
    return pack_nibbles(rearrange(codes, pattern, half=2, r=8, word=4, side=2, c=4, pair=2))


def unpack_tiles(packed: Tensor, n: int, k: int) -> Tensor:
    """[ceil(n/16), ceil(k/64), 32, 4] int32 -> codes [n, k] int32."""
    pattern = "i j (r c) word (pair side half) -> (i half r) (j word side c pair)"
    return rearrange(unpack_nibbles(packed), pattern, r=8, c=4, pair=2, side=2, half=2)[:n, :k]


def pack_awq_gemv(codes: Tensor) -> Tensor:
    """llm-awq v1 ("gemv"), codes [n, k] -> [n, k/8] int32: eight codes of a row, in order."""
    return pack_nibbles(rearrange(codes, "n (c i) -> n c i", i=CODES_PER_WORD))


def unpack_awq_gemv(packed: Tensor) -> Tensor:
    """[n, k/8] int32 -> codes [n, k] int32."""
    return unpack_nibbles(packed).flatten(-2)


def pack_awq_gemm(codes: Tensor) -> Tensor:
    """AutoAWQ "gemm", codes [n, k] -> [k, n/8] int32: eight outputs of an input, evens before odds."""
    return pack_nibbles(rearrange(codes, "(c i) k -> k c i", i=CODES_PER_WORD)[..., list(AWQ_GEMM_ORDER)])


def unpack_awq_gemm(packed: Tensor) -> Tensor:
    """[k, n/8] int32 -> codes [n, k] int32."""
    inverse_order = torch.tensor(AWQ_GEMM_ORDER, device=packed.device).argsort()
    return rearrange(unpack_nibbles(packed)[..., inverse_order], "k c i -> (c i) k")


def pack_awq_v2(codes: Tensor) -> Tensor:
    """llm-awq v2, codes [n, k] -> [n/4, k] int16. Four outputs and 64 inputs share 64 halfwords:

    input 32 b + 8 s + e of output i (b = 0, 1; s = 0..3; e = 0..7) is nibble s of halfword 16 i + 8 b + e.
    """
    nibbles = rearrange(codes.int(), "(n i) (k b s e) -> n (k i b e) s", i=4, b=2, s=4, e=8)
    shifts = torch.arange(0, 16, 4, device=codes.device, dtype=torch.int32)
    return (nibbles << shifts).sum(-1).to(torch.uint16).view(torch.int16)


def unpack_awq_v2(packed: Tensor) -> Tensor:
    """[n/4, k] int16 -> codes [n, k] int32."""
    shifts = torch.arange(0, 16, 4, device=packed.device, dtype=torch.int32)
    nibbles = (packed.int()[..., None] >> shifts) & 0xF  # [n/4, k, 4]
    return rearrange(nibbles, "n (k i b e) s -> (n i) (k b s e)", i=4, b=2, e=8)


def padded_scale_rows(k: int, group_size: int) -> int:
    """Rows that v2 stores for scales and zeros, of which the first k/group are real and the others 0.

    Errors: ValueError for a group other than 128 (or a multiple), 64 or 32.
    """
    multiple = {32: 4, 64: 2}.get(group_size, 1 if group_size % 128 == 0 else 0)
    if not multiple:
        raise ValueError(f"llm-awq v2 has no groups of {group_size}: they are 32, 64 or a multiple of 128")
    width = -(-(k // group_size) // CODES_PER_WORD)
    return CODES_PER_WORD * (-(-width // multiple) * multiple)
