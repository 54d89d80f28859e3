"""Rounding that knows the inputs: codes that lose least of x · wᵀ on average, not of w.

With the inputs' second moment H = E[x xᵀ], the loss of a row is (w - ŵ) H (w - ŵ)ᵀ.
"""

import torch
from einops import rearrange
from torch import Tensor

from .grid import Grid

BLOCK = 128  # columns between updates of all that follow
DAMP = 0.01  # of the mean of H's diagonal, added to it, so that what calibration never showed is not free


def damped(moment: Tensor, damp: float = DAMP) -> Tensor:
    """H [k, k] with its diagonal raised."""
    floor = damp * moment.diagonal().mean().clamp(min=1e-12)
    return moment + torch.diag(floor.expand(len(moment)))


def compensated(w: Tensor, grid: Grid, moment: Tensor) -> Tensor:
    """Codes [n, k]: inputs one after the other, loudest first, each error made good by those not yet rounded.

    Frantar et al. 2022 (GPTQ), on a grid that is given; w [n, k], moment [k, k] damped.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    left = w[:, order].clone()
    wide = grid.spread(w.shape[1])
    scales, zeros = wide.scales[:, order], wide.zeros[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)  # row j: what rounding input j asks of those after it
    codes = torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        part = slice(start, min(start + BLOCK, w.shape[1]))
        errors = torch.zeros_like(left[:, part])
        for j in range(part.start, part.stop):
            here = Grid(scales[:, j], zeros[:, j])
            code = here.snap(left[:, j])
            error = (left[:, j] - here.value(code)) / upper[j, j]
            codes[:, order[j]], errors[:, j - start] = code, error
            left[:, j + 1 : part.stop] -= error[:, None] * upper[j, j + 1 : part.stop]
        left[:, part.stop :] -= errors @ upper[part, part.stop :]
    return codes


def descended(w: Tensor, codes: Tensor, grid: Grid, moment: Tensor) -> Tensor:
    """Codes [n, k] after one sweep in which each is set to the best level given all the others."""
    wide = grid.spread(w.shape[1])
    codes, value = codes.clone(), wide.value(codes)
    pull = (w - value) @ moment  # [n, k]: half the loss's slope, downwards
    for start in range(0, w.shape[1], BLOCK):
        part = slice(start, min(start + BLOCK, w.shape[1]))
        moved = torch.zeros_like(value[:, part])
        for j in range(part.start, part.stop):
            here = Grid(wide.scales[:, j], wide.zeros[:, j])
            code = here.snap(value[:, j] + pull[:, j] / moment[j, j])
            moved[:, j - start] = here.value(code) - value[:, j]
            codes[:, j] = code
            pull[:, j : part.stop] -= moved[:, j - start, None] * moment[j, j : part.stop]
        pull[:, part.stop :] -= moved @ moment[part, part.stop :]
    return codes


def refitted(w: Tensor, codes: Tensor, grid: Grid, moment: Tensor) -> Grid:
    """The grid whose scales lose least for given codes: one system of G equations a row."""
    n, k = w.shape
    G = grid.scales.shape[1]
    steps = codes - grid.spread(k).zeros  # [n, k]: ŵ = steps · scale
    by_group = rearrange(steps, "n (G i) -> G n i", G=G)
    target = rearrange((w @ moment) * steps, "n (G i) -> n G i", G=G).sum(-1)  # [n, G]
    system = w.new_empty(n, G, G)
    for g in range(G):
        rows = by_group[g] @ rearrange(moment, "(G i) k -> G i k", G=G)[g]  # [n, k]
        system[:, g] = rearrange(rows * steps, "n (G i) -> n G i", G=G).sum(-1)
    ridge = 1e-4 * system.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)
    eye = torch.eye(G, device=w.device) * ridge[:, None, None]
    scales = torch.linalg.solve(system + eye, target + ridge[:, None] * grid.scales)
    scales = scales.half().float()
    usable = (scales > 0.5 * grid.scales) & (scales < 2 * grid.scales)
    return Grid(torch.where(usable, scales, grid.scales), grid.zeros)


def loss(w: Tensor, codes: Tensor, grid: Grid, moment: Tensor) -> Tensor:
    """(w - ŵ) H (w - ŵ)ᵀ of each row: [n]."""
    delta = w - grid.spread(w.shape[1]).value(codes)
    return ((delta @ moment) * delta).sum(-1)
