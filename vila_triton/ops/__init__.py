"""What each op means: its plain-torch reference, its domain and its cost.

One axis alphabet, here and everywhere:

    b batch (sequences)   s new tokens, all sequences end to end   t tokens of one sequence (cached ones first)
    h query heads   g key/value heads   d head dim   r rotary pairs (d/2)
    e model width   f ffn width   v vocabulary   p pages   l page length   c picture channels
    m, n, k matrix product (rows, columns, summed)   G groups along k

References run in any dtype, float64 included, on CPU or GPU. Sums are taken in float32 at least.

Every file here is found, and an op in it is `vila_triton.ops.NAME`, named below or not.
"""

import sys

from vila_triton.registry import OPS
from vila_triton.registry.discovery import import_modules, record_problem

from .attention import RaggedBatch, merge_attention_states
from .decode_attention import decode_attention
from .elementwise import layer_norm, rms_norm, rope, swiglu
from .encoder_attention import encoder_attention
from .int4 import Int4, dequantize, int4_matmul, int4_swiglu, quantize_rtn
from .kv_pages import KVPages, PagedKV, QuantizedKVPages, empty_kv_pages, page_tensors
from .kv_write import kv_write
from .linear import linear
from .prefill_attention import prefill_attention
from .rope_kv_write import rope_kv_write

__all__ = [
    "Int4",
    "KVPages",
    "PagedKV",
    "QuantizedKVPages",
    "RaggedBatch",
    "decode_attention",
    "dequantize",
    "empty_kv_pages",
    "encoder_attention",
    "int4_matmul",
    "int4_swiglu",
    "kv_write",
    "layer_norm",
    "linear",
    "merge_attention_states",
    "page_tensors",
    "prefill_attention",
    "quantize_rtn",
    "rms_norm",
    "rope",
    "rope_kv_write",
    "swiglu",
]


def discover_ops() -> None:
    """Import what lies here, and tell what an op of it lacks."""
    import_modules(sys.modules[__name__])
    for name, op in OPS.items():
        if op.reference.__module__.startswith(f"{__name__}."):
            globals()[name] = op
            record_problem(
                name, f"{op.file.name}: op {name!r} lacks {', '.join(op.missing_parts)}" if op.missing_parts else ""
            )


discover_ops()
