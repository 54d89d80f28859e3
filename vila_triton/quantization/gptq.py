"""GPTQ: codes that lose least of the output w x, not of the weight w (Frantar et al. 2022).

With the Hessian H = E[x xᵀ] of the inputs, the expected squared error of an output row is (w - ŵ) H (w - ŵ)ᵀ.
"""

import torch
from torch import Tensor

from .quant_grid import QuantGrid

BLOCK_COLUMNS = 64  # columns between updates of all later ones


def gptq_codes(w: Tensor, grid: QuantGrid, act_order: Tensor, inverse_cholesky: Tensor) -> Tensor:
    """Quantize a weight w [n, k] column by column -> codes [n, k] (GPTQ, Frantar et al. 2022).

    The rounding error of each column is distributed over the columns that are not quantized yet, by the rows of the
    inverse Hessian's Cholesky factor. The columns of a block of BLOCK_COLUMNS are updated one by one, all later ones
    once a block.

    grid: the scales and zero points, which stay; act_order [k] and inverse_cholesky [k, k]: as in `HessianInfo`.
    """
    columns = grid.expand_to_columns(w.shape[1])
    # Transposed to [k, n], so that a column of w is contiguous.
    scales, zeros, remaining = (x.T[act_order] for x in (columns.scales, columns.zeros, w))
    codes = torch.empty_like(remaining)
    for start in range(0, len(remaining), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(remaining))
        errors = torch.empty_like(remaining[start:stop])
        for j in range(start, stop):
            column_grid = QuantGrid(scales[j], zeros[j])
            codes[j] = column_grid.to_codes(remaining[j])
            errors[j - start] = (remaining[j] - column_grid.to_weights(codes[j])) / inverse_cholesky[j, j]
            remaining[j + 1 : stop].addr_(inverse_cholesky[j, j + 1 : stop], errors[j - start], alpha=-1)
        remaining[stop:].addmm_(inverse_cholesky[start:stop, stop:].T, errors, alpha=-1)
    return codes[act_order.argsort()].T.contiguous()


def hessian_loss(delta: Tensor, hessian: Tensor) -> Tensor:
    """The expected squared output error delta H deltaᵀ of each row of a weight error delta: [n, k] -> [n]."""
    return ((delta @ hessian) * delta).sum(-1)
