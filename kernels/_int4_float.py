"""A lane's codes as float32 numbers, for kernels that multiply without tensor cores. It registers nothing."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ._int4 import SUBTRACTED, lane_weights

# Codes to float32 differences: as `MAGIC` in _int4.py, then the zeros (1024 + zero and 64 + zero, the latter negative)
# are subtracted two at a time, exactly, and each is converted. `float_weights` says the same without assembly.
DIFFERENCES = tl.constexpr("""
{
.reg .b32 h, a, b, c, d, t, l, s;
.reg .b16 x, y;
mov.b32 t, {$9, $9};
mov.b32 l, {$10, $10};
mov.b32 s, 0x2c002c00;
shr.u32 h, $8, 8;
lop3.b32 a, $8, 0x000f000f, 0x64006400, 0xea;
lop3.b32 b, $8, 0x00f000f0, 0x64006400, 0xea;
lop3.b32 c, h, 0x000f000f, 0x64006400, 0xea;
lop3.b32 d, h, 0x00f000f0, 0x64006400, 0xea;
sub.rn.f16x2 a, a, t;
sub.rn.f16x2 c, c, t;
fma.rn.f16x2 b, b, s, l;
fma.rn.f16x2 d, d, s, l;
mov.b32 {x, y}, a;
cvt.f32.f16 $0, x;
cvt.f32.f16 $1, y;
mov.b32 {x, y}, b;
cvt.f32.f16 $2, x;
cvt.f32.f16 $3, y;
mov.b32 {x, y}, c;
cvt.f32.f16 $4, x;
cvt.f32.f16 $5, y;
mov.b32 {x, y}, d;
cvt.f32.f16 $6, x;
cvt.f32.f16 $7, y;
}""")


@triton.jit
def float_weights(words, scale, low_scale, zero, low_zero, ORDER: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """`lane_weights` in float32."""
    if ASM and ORDER == SUBTRACTED and tl.float16 == DTYPE:
        top = (zero.to(tl.float16) + 1024).broadcast_to(words.shape)
        low = (-64 - low_zero.to(tl.float16)).broadcast_to(words.shape)
        return tl.inline_asm_elementwise(
            DIFFERENCES, "=f,=f,=f,=f,=f,=f,=f,=f,r,h,h", [words, top, low], (tl.float32,) * 8, is_pure=True, pack=1
        )
    else:
        a, b, c, d, e, f, g, h = lane_weights(words, scale, low_scale, zero, low_zero, ORDER, DTYPE, ASM)
        a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
        return a, b, c, d, e.to(tl.float32), f.to(tl.float32), g.to(tl.float32), h.to(tl.float32)
