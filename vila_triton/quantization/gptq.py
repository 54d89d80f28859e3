"""Rounding that knows the inputs: codes that lose least of x · wᵀ on average, not of w.

With the inputs' second moment H = E[x xᵀ], the loss of a row is (w - ŵ) H (w - ŵ)ᵀ.
"""

import torch
from torch import Tensor

from .quant_grid import QuantGrid

BLOCK_COLUMNS = 64  # inputs between updates of all that follow


def gptq_codes(w: Tensor, grid: QuantGrid, act_order: Tensor, inverse_cholesky: Tensor) -> Tensor:
    """Codes [n, k]: inputs one after the other, loudest first, each error made good by those not yet rounded.

    Frantar et al. 2022 (GPTQ), on a grid that is given; w [n, k], order and upper as in `Moments`: row j of upper is
    what the j-th input asks of those after it.
    """
    columns = grid.expand_to_columns(w.shape[1])
    scales, zeros, remaining = (
        x.T[act_order] for x in (columns.scales, columns.zeros, w)
    )  # [k, n]: an input is a contiguous row
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
    """delta H deltaᵀ of each row, [n, k] -> [n]."""
    return ((delta @ hessian) * delta).sum(-1)
