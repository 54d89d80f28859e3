"""x · wᵀ by the fastest product of torch for the dtype on a CPU, as measured on AMD CPUs (`python -m bench.model`).

float32            one row: oneDNN's, as fast as memory, where MKL's takes half as long again. A few: oneDNN's with w as
                   its left operand, which it reads as it lies; the right one, here x, it lays out anew, which for w
                   takes as long as eight rows. Many: oneDNN's, or `F.linear`, MKL's, which is a tenth faster on a CPU
                   of AMD without AVX-512, and by half slower on one with it. A w that is not contiguous, as one that
                   is transposed for a gradient, is multiplied as by many rows
                   Without oneDNN in torch, as on some laptops, always `F.linear`
bfloat16, float16  where the CPU has instructions for it, `F.linear`, which runs oneDNN's; but for one row torch's own,
                   which takes half as long: oneDNN is disabled for one row (in the whole process: a product in another
                   thread may be slower, but not wrong). A CPU without them takes up to four rows by torch's own loops
                   and multiplies more in float32, the weight converted in blocks that stay in its cache
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import mkldnn  # which is what torch calls oneDNN

from vila_triton.lock import SharedContext
from vila_triton.ops import linear

MANY_ROWS = 256  # of float32
FEW_ROWS = 4  # up to here torch's own loops over half precision take no longer than converting the weight
BLOCK_N = 512  # rows of a weight that are converted at once


@contextmanager
def without_onednn() -> Iterator[None]:
    """Disable oneDNN in the whole process for the length of a block."""
    was_enabled = mkldnn.enabled
    mkldnn.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        mkldnn.enabled = was_enabled  # pyright: ignore[reportAttributeAccessIssue]


ONEDNN_OFF = SharedContext(without_onednn)


def has_instructions_for(dtype: torch.dtype) -> bool:
    """Return whether oneDNN is there and multiplies numbers of a half-precision dtype on this CPU."""
    if not mkldnn.is_available():
        return False
    is_supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return is_supported[dtype]()


@cache
def has_avx512() -> bool:
    """Return whether torch runs instructions of AVX-512 on this CPU."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def float32_product(x: Tensor, w: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x · wᵀ + bias + residual [m, n] of float32 tensors x [m, k], w [n, k], bias [n], residual [m, n]."""
    is_few = 1 < len(x) < MANY_ROWS and w.is_contiguous()
    if not mkldnn.is_available() or not (is_few or len(x) == 1 or has_avx512()):
        out = F.linear(x, w, bias)
        return out if residual is None else out + residual
    product = torch.ops.mkldnn._linear_pointwise
    if is_few:
        out = product(w, filled_up(x), None, "none", [], "").t()[: len(x)].contiguous()
        for term in (bias, residual):
            out = out if term is None else out.add_(term)
        return out
    # oneDNN reads a bias and a residual as if they had no strides.
    bias = None if bias is None else bias.contiguous()
    if residual is None:
        return product(filled_up(x), w, bias, "none", [], "")[: len(x)]
    return product.binary(filled_up(x), filled_up(residual), w, bias, "add")[: len(x)]


def filled_up(x: Tensor) -> Tensor:
    """Return x [m, k] with rows of zeros behind it, up to a number of four binary digits: oneDNN compiles a kernel for
    each number of rows, and keeps half a megabyte for it.
    """
    missing = -len(x) % (1 << max(0, len(x).bit_length() - 4))
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def half_product(x: Tensor, w: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x · wᵀ + bias + residual [m, n] in the half precision of x [m, k], w [n, k], bias [n], residual [m, n]."""
    has_instructions = has_instructions_for(x.dtype)
    if has_instructions or len(x) <= FEW_ROWS:
        with ONEDNN_OFF if has_instructions and len(x) == 1 else nullcontext():
            return linear.reference(x, w, bias, residual)
    rows, out = x.float(), x.new_empty(len(x), len(w))
    for start in range(0, len(w), BLOCK_N):
        block = slice(start, start + BLOCK_N)
        terms = (None if term is None else term[..., block].float() for term in (bias, residual))
        out[:, block] = float32_product(rows, w[block].float(), *terms)
    return out
