"""Device functions that dequantize int4 weights: words to numbers, and where words, scales and zeros are.

A load of words is [TILES_N, TILES_K, 32, 4]: tiles of 16 x 64, lanes, and a lane's four words, one 16-byte load. A word
holds codes of two rows of its tile, `top` (r) and `low` (r + 8); see `pack_tiles`. Scales and zeros are loaded for
these two rows, so that all arithmetic on a weight happens in the lane that loaded it. Only then is the tile put
together, in the registers where the tensor cores want it.
"""

import triton
import triton.language as tl

from ._launch import ieee_operand, opaque_copy

# The ROUNDING of a kernel: what it does to a weight before it multiplies.
UNSCALED = tl.constexpr(0)  # code - zero, exact: the scale multiplies a sum
SUB = tl.constexpr(1)  # (code - zero) * scale, rounded
FMA = tl.constexpr(2)  # code * scale + shift, rounded

# One logical operation makes two float16 numbers of two codes: 1024 + code of the lower nibble of a byte, or 1024 + 16
# code of the upper one; one more subtracts both zeros, exactly. The operands are the word, 1024 + zero of the top row,
# and -64 - zero of the low one. `codes_minus_zero` does the same without assembly.
FLOAT16_ASM = tl.constexpr("""
{
.reg .b32 h, a, b, c, d, t, l, s;
mov.b32 t, {$9, $9};
mov.b32 l, {$10, $10};
mov.b32 s, 0x2c002c00;
shr.u32 h, $8, 8;
lop3.b32 a, $8, 0x000f000f, 0x64006400, 0xea;
lop3.b32 b, $8, 0x00f000f0, 0x64006400, 0xea;
lop3.b32 c, h, 0x000f000f, 0x64006400, 0xea;
lop3.b32 d, h, 0x00f000f0, 0x64006400, 0xea;
sub.rn.f16x2 a, a, t;
fma.rn.f16x2 b, b, s, l;
sub.rn.f16x2 c, c, t;
fma.rn.f16x2 d, d, s, l;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")
# The same in bfloat16, which has 8 bits: 128 + code, and so each nibble is shifted down. The operands are the word and
# -128 - zero of the top and of the low row.
BFLOAT16_ASM = tl.constexpr("""
{
.reg .b32 h, i, j, a, b, c, d, t, l, o;
mov.b32 t, {$9, $9};
mov.b32 l, {$10, $10};
mov.b32 o, 0x3f803f80;
shr.u32 h, $8, 4;
shr.u32 i, $8, 8;
shr.u32 j, $8, 12;
lop3.b32 a, $8, 0x000f000f, 0x43004300, 0xea;
lop3.b32 b, h, 0x000f000f, 0x43004300, 0xea;
lop3.b32 c, i, 0x000f000f, 0x43004300, 0xea;
lop3.b32 d, j, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 a, a, o, t;
fma.rn.bf16x2 b, b, o, l;
fma.rn.bf16x2 c, c, o, t;
fma.rn.bf16x2 d, d, o, l;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")
ASM_CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,h,h")


@triton.jit
def apply_scale(differences, codes, scales, zeros, ROUNDING: tl.constexpr):
    """The weights of differences = code - zero and of codes, scaled and rounded as ROUNDING says."""
    if ROUNDING == FMA:
        shifts = -(zeros * scales)
        return tl.fma(codes.to(tl.float32), scales.to(tl.float32), shifts.to(tl.float32)).to(scales.dtype)
    elif ROUNDING == SUB:
        return differences * scales
    else:
        return differences


@triton.jit
def code_to_float16(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """A code as the float16 number 1024 + code, or 1024 + 16 code where MASK takes it from the upper nibble."""
    return ((words >> SHIFT) & MASK | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def code_to_bfloat16(words, SHIFT: tl.constexpr):
    """A code as the bfloat16 number 128 + code."""
    return ((words >> SHIFT) & 0xF | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def codes_minus_zero(words, zero, low_zero, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """code - zero, in float16 (or bfloat16, if DTYPE is that), of nibbles 0 4 1 5 2 6 3 7 of each word: of inputs 2c
    and 2c + 1 of the top row, of the low row, of inputs 2c + 8 and 2c + 9 of the top row, of the low row.
    """
    if tl.bfloat16 == DTYPE:
        zero = zero.to(tl.bfloat16) + 128
        low_zero = low_zero.to(tl.bfloat16) + 128
        if ASM:
            return tl.inline_asm_elementwise(
                BFLOAT16_ASM, ASM_CONSTRAINTS, [words, -zero, -low_zero], (tl.bfloat16,) * 8, is_pure=True, pack=1
            )
        else:
            return (
                code_to_bfloat16(words, 0) - zero,
                code_to_bfloat16(words, 16) - zero,
                code_to_bfloat16(words, 4) - low_zero,
                code_to_bfloat16(words, 20) - low_zero,
                code_to_bfloat16(words, 8) - zero,
                code_to_bfloat16(words, 24) - zero,
                code_to_bfloat16(words, 12) - low_zero,
                code_to_bfloat16(words, 28) - low_zero,
            )
    else:
        zero = zero.to(tl.float16) + 1024
        low_zero = low_zero.to(tl.float16) + 64
        if ASM:
            return tl.inline_asm_elementwise(
                FLOAT16_ASM, ASM_CONSTRAINTS, [words, zero, -low_zero], (tl.float16,) * 8, is_pure=True, pack=1
            )
        else:
            high = words >> 16
            return (
                code_to_float16(words, 0, 0xF) - zero,
                code_to_float16(high, 0, 0xF) - zero,
                code_to_float16(words, 0, 0xF0) * 0.0625 - low_zero,
                code_to_float16(high, 0, 0xF0) * 0.0625 - low_zero,
                code_to_float16(words, 8, 0xF) - zero,
                code_to_float16(high, 8, 0xF) - zero,
                code_to_float16(words, 8, 0xF0) * 0.0625 - low_zero,
                code_to_float16(high, 8, 0xF0) * 0.0625 - low_zero,
            )


@triton.jit
def scale_difference(difference, scale, zero, ROUNDING: tl.constexpr, DTYPE: tl.constexpr):
    """The weight of one exact code - zero in DTYPE, scaled and rounded as ROUNDING says."""
    difference = difference.to(DTYPE)
    if ROUNDING == FMA:
        return apply_scale(difference, difference + zero.to(DTYPE), scale, zero.to(DTYPE), ROUNDING)
    else:
        return apply_scale(difference, difference, scale, zero, ROUNDING)


@triton.jit
def lane_weights(
    words, scale, low_scale, zero, low_zero, ROUNDING: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):
    """The eight weights of each word, in the order of `codes_minus_zero`; `scale` and `zero` are of the top row."""
    a, b, c, d, e, f, g, h = codes_minus_zero(words, zero, low_zero, DTYPE, ASM)
    scale = scale.to(DTYPE)
    low_scale = low_scale.to(DTYPE)
    return (
        scale_difference(a, scale, zero, ROUNDING, DTYPE),
        scale_difference(b, scale, zero, ROUNDING, DTYPE),
        scale_difference(c, low_scale, low_zero, ROUNDING, DTYPE),
        scale_difference(d, low_scale, low_zero, ROUNDING, DTYPE),
        scale_difference(e, scale, zero, ROUNDING, DTYPE),
        scale_difference(f, scale, zero, ROUNDING, DTYPE),
        scale_difference(g, low_scale, low_zero, ROUNDING, DTYPE),
        scale_difference(h, low_scale, low_zero, ROUNDING, DTYPE),
    )


@triton.jit
def lanes_to_tile(a, b, c, d, e, f, g, h, OPAQUE: tl.constexpr, TILES_N: tl.constexpr, TILES_K: tl.constexpr):
    """The eight tensors of `lane_weights` -> w [16 TILES_N, 64 TILES_K]."""
    w = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    w = tl.reshape(w, [TILES_N, TILES_K, 8, 4, 4, 2, 2, 2])  # tile, tile_k, r, c, word, pair, half, side
    w = tl.permute(w, [0, 6, 2, 1, 4, 7, 3, 5])  # tile, half, r, tile_k, word, side, c, pair
    w = tl.reshape(w, [16 * TILES_N, 64 * TILES_K])
    if OPAQUE:
        return opaque_copy(w)
    else:
        return ieee_operand(w)


@triton.jit
def lane_rows(tile, r, N):
    """The rows of w, top and low, that a lane holds of a tile. Past n they are row 0."""
    top = tile * 16 + r
    low = top + 8
    return tl.where(top < N, top, 0), tl.where(low < N, low, 0)


@triton.jit
def word_pointers(qweight_ptr, tile, tile_k, lane, word, N, K):
    """Pointers to words; row tiles past n are tile 0."""
    tile = tl.where(tile < (N + 15) // 16, tile, 0)
    return qweight_ptr + (tile * ((K + 63) // 64) + tile_k) * 128 + lane * 4 + word


@triton.jit
def group_ids(start, tile_k, word, K, GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The group of each word of a step of BLOCK_K inputs from `start` on; past k, the last. `tile_k` and `word` are
    counted within the step; what does not matter is left out of the shape.
    """
    if GROUP_SIZE % BLOCK_K == 0:
        return tl.full([1], start // GROUP_SIZE, tl.int64)
    elif GROUP_SIZE == 32:
        return tl.minimum(tile_k * 2 + word // 2 + start // 32, (K - 1) // 32).to(tl.int64)
    else:
        return tl.minimum((tile_k * 64 + start) // GROUP_SIZE, (K - 1) // GROUP_SIZE).to(tl.int64)
