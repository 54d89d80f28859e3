"""grad_out · w by torch's matrix product, w unpacked in blocks of columns that stay in the CPU's cache.

As `int4_matmul_blocked`, but a block is BLOCK_K columns of all rows of w, so that every sum is one product. The result
is put from the order of the bytes of w (`_int4_blocks`) into that of its columns.
"""

from torch import Tensor

from vila_triton.ops import Int4, int4_matmul_backward
from vila_triton.ops.dtypes import upcast

from ._cpu_product import half_product
from ._int4_blocks import BlockedWeight, check_byte_order, product_for, restore_order, whole_tiles

CONFIGS = [{"BLOCK_K": 256}, {"BLOCK_K": 64}]


@int4_matmul_backward.impl("blocked", configs=CONFIGS)
def int4_matmul_backward_blocked(grad_out: Tensor, w: Int4, *, BLOCK_K: int) -> Tensor:
    """Return grad_out · w [..., k] in the dtype of grad_out; raises Unsupported on a big-endian machine."""
    check_byte_order("int4_matmul_backward")
    n, k = w.shape
    grads = grad_out.reshape(grad_out.shape[:-1].numel(), n)  # [m, n]
    if not grads.numel():
        return grad_out.new_zeros(*grad_out.shape[:-1], k)
    product = product_for(grads)
    inputs = grads if product is half_product else upcast(grads)
    blocks = BlockedWeight(w, grad_out.dtype, BLOCK_K)
    grad_x = grad_out.new_empty(len(grads), k)
    for start in range(0, k, BLOCK_K):
        columns = slice(start, min(start + BLOCK_K, whole_tiles(k)))
        weight = blocks.block(slice(0, n), columns).to(inputs.dtype)  # [n, k']
        grad_x[:, start : columns.stop] = restore_order(product(inputs, weight.t()))[:, : k - start]
    return grad_x.view(*grad_out.shape[:-1], k)
