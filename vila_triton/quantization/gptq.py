"""Rounding that knows the inputs: codes that lose least of x · wᵀ on average, not of w.

With the inputs' second moment H = E[x xᵀ], the loss of a row is (w - ŵ) H (w - ŵ)ᵀ.
"""

import torch
from torch import Tensor

from .quant_grid import Grid

BLOCK = 64  # inputs between updates of all that follow


def compensated(w: Tensor, grid: Grid, order: Tensor, upper: Tensor) -> Tensor:
    """Codes [n, k]: inputs one after the other, loudest first, each error made good by those not yet rounded.

    Frantar et al. 2022 (GPTQ), on a grid that is given; w [n, k], order and upper as in `Moments`: row j of upper is
    what the j-th input asks of those after it.
    """
    wide = grid.spread(w.shape[1])
    scales, zeros, left = (x.T[order] for x in (wide.scales, wide.zeros, w))  # [k, n]: an input is a contiguous row
    codes = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            here = Grid(scales[j], zeros[j])
            codes[j] = here.snap(left[j])
            errors[j - start] = (left[j] - here.value(codes[j])) / upper[j, j]
            left[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes[order.argsort()].T.contiguous()


def loss(delta: Tensor, second: Tensor) -> Tensor:
    """delta H deltaᵀ of each row, [n, k] -> [n]."""
    return ((delta @ second) * delta).sum(-1)
