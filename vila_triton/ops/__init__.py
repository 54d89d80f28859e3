"""The ops: the plain-torch reference of each, the sizes it is tested at, and its cost.

One axis alphabet, here and everywhere:

    b batch (sequences)   s new tokens, all sequences end to end   t tokens of one sequence (cached ones first)
    h query heads   g key/value heads   d head dim   r rotary pairs (d/2)
    e model width   f ffn width   v vocabulary   p pages   l page size   c image channels
    m, n, k matrix product (rows, columns, summed)   G groups along k

References run in any dtype, float64 included, on CPU or GPU. Sums are taken in float32 at least.

    dtypes, shapes, indices   dtypes and random examples; the checks that ops make of their arguments
    elementwise               rms_norm, layer_norm, rope, swiglu
    int4_weight               `Int4`, a weight in 4 bits: quantizing and dequantizing it
    linear, int4              products with plain and with int4 weights
    attention                 what the three attentions share; merging their partial results
    attention_cases           their hard cases, as arguments for tests
    prefill_attention, decode_attention, encoder_attention
    backward                  the parts that ops of gradients share
    elementwise_backward      rms_norm_backward, swiglu_backward
    int4_backward             int4_matmul_backward
    attention_backward        what the two below share
    prefill_attention_backward, encoder_attention_backward
    kv_pages                  the pages of the KV cache
    kv_write, rope_kv_write   new keys and values into pages, the second with the rotary embedding

Every file here is discovered: an op in a new one is `vila_triton.ops.NAME` without being listed below. So is one in a
file of kernels that was given by path or came with a distribution, unless a name above is the same.
"""

import sys
from typing import TYPE_CHECKING

from vila_triton.registry import OPS, Op
from vila_triton.registry.imports import import_modules, record_missing_parts

from .attention import RaggedBatch, merge_attention_states
from .decode_attention import decode_attention
from .elementwise import layer_norm, rms_norm, rope, swiglu
from .elementwise_backward import rms_norm_backward, swiglu_backward
from .encoder_attention import encoder_attention
from .encoder_attention_backward import encoder_attention_backward
from .int4 import int4_matmul, int4_swiglu
from .int4_backward import int4_matmul_backward
from .int4_weight import Int4, dequantize
from .kv_pages import KVPages, PagedKV, QuantizedKVPages, empty_kv_pages, page_tensors
from .kv_write import kv_write
from .linear import linear
from .prefill_attention import prefill_attention, without_context
from .prefill_attention_backward import prefill_attention_backward
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
    "encoder_attention_backward",
    "int4_matmul",
    "int4_matmul_backward",
    "int4_swiglu",
    "kv_write",
    "layer_norm",
    "linear",
    "merge_attention_states",
    "page_tensors",
    "prefill_attention",
    "prefill_attention_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_kv_write",
    "swiglu",
    "swiglu_backward",
    "without_context",
]


def discover_ops() -> None:
    """Import every file of this folder, and report the parts that an op in them lacks."""
    import_modules(sys.modules[__name__])
    for name, op in OPS.items():
        if op.reference.__module__.startswith(f"{__name__}."):
            globals()[name] = op  # not the module of that name
    record_missing_parts()


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Op:
        """An op of a file that is not listed above, wherever it lies, once it has been discovered."""
        if name in OPS:
            return OPS[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


discover_ops()
