"""What each op means: its plain-torch reference, its domain and its cost.

One axis alphabet, here and everywhere:

    b batch (sequences)   s new tokens, all sequences end to end   t tokens of one sequence (cached ones first)
    h query heads   g key/value heads   d head dim   r rotary pairs (d/2)
    e model width   f ffn width   v vocabulary   p pages   l page length   c picture channels
    m, n, k matrix product (rows, columns, summed)   G groups along k

References run in any dtype, float64 included, on CPU or GPU. Sums are taken in float32 at least.
"""

from .attention import decode_attention, encoder_attention, prefill_attention
from .elementwise import layer_norm, rms_norm, rope, swiglu
from .int4 import Int4, dequantize, int4_matmul, int4_swiglu, quantize
from .linear import linear
from .paged import kv_write

__all__ = [
    "Int4",
    "decode_attention",
    "dequantize",
    "encoder_attention",
    "int4_matmul",
    "int4_swiglu",
    "kv_write",
    "layer_norm",
    "linear",
    "prefill_attention",
    "quantize",
    "rms_norm",
    "rope",
    "swiglu",
]
