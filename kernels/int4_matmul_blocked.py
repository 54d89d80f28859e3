"""x · wᵀ + bias + residual by torch's matrix product, w unpacked in blocks of rows that stay in the CPU's cache.

A block of w, BLOCK_N rows of k columns, is unpacked and multiplied while it is in the cache, so that the whole weight
is never in memory. Every shape and dtype is served. Half precision is multiplied in float32, and the weight not
rounded, unless the CPU has instructions for it: then it is rounded as in the reference. x is permuted to the order of
the bytes of w (`_int4_blocks`).
"""

from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.ops.dtypes import upcast

from ._cpu_product import half_product
from ._int4_blocks import BlockedWeight, check_byte_order, permute_to_byte_order, product_for, whole_tiles

CONFIGS = [{"BLOCK_N": 512}, {"BLOCK_N": 32}, {"BLOCK_N": 128}]


@int4_matmul.impl("blocked", configs=CONFIGS)
def int4_matmul_blocked(
    x: Tensor, w: Int4, bias: Tensor | None = None, residual: Tensor | None = None, *, BLOCK_N: int
) -> Tensor:
    """Return x · wᵀ + bias + residual [..., n] in x's dtype; raises Unsupported on a big-endian machine."""
    check_byte_order("int4_matmul")
    (n, k), rows = w.shape, x.reshape(-1, x.shape[-1])  # [m, k]
    product = product_for(x)
    widen = (lambda y: y) if product is half_product else upcast
    inputs = widen(permute_to_byte_order(rows))
    blocks, columns = BlockedWeight(w, x.dtype, whole_tiles(k)), slice(0, inputs.shape[-1])
    out = x.new_empty(len(rows), n)
    residual = None if residual is None else residual.reshape(out.shape)
    for start in range(0, n if len(rows) else 0, BLOCK_N):
        block = slice(start, min(start + BLOCK_N, n))
        terms = (None if term is None else widen(term[..., block]) for term in (bias, residual))
        out[:, block] = product(inputs, blocks.block(block, columns).to(inputs.dtype), *terms)
    return out.view(*x.shape[:-1], n)
