"""Sixteen levels a group: where they lie (`Grid`), which is nearest, and how far to clip.

A weight [n, k] is cut into G = k / group runs of inputs. The levels of a run are (code - zero) · scale, code and zero
whole numbers 0 to 15; the scale is a number of float16, so that what is stored is what was searched for.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from vila_triton.checkpoints.int4_packing import pack_tiles
from vila_triton.ops import Int4
from vila_triton.ops.int4 import check_int4, step

LARGEST = torch.finfo(torch.float16).max  # scale


@dataclass(frozen=True)
class Grid:
    """scales and zeros [n, G] float32, the scales rounded to float16."""

    scales: Tensor
    zeros: Tensor

    def spread(self, k: int) -> "Grid":
        """One column an input: [n, k]."""
        group = k // self.scales.shape[1]
        return Grid(self.scales.repeat_interleave(group, 1), self.zeros.repeat_interleave(group, 1))

    def snap(self, w: Tensor) -> Tensor:
        """The nearest codes to weights that lie as the grid does, [n, k] by [n, k]; float32."""
        return (w / self.scales + self.zeros).round_().clamp_(0, 15)

    def value(self, codes: Tensor) -> Tensor:
        """The weights that codes stand for."""
        return (codes - self.zeros) * self.scales


def between(low: Tensor, high: Tensor) -> Grid:
    """The grid from low <= 0 to high >= 0, [n, G]."""
    scales = step((high - low).clamp(max=15 * LARGEST), torch.float16).float()
    return Grid(scales, (-low / scales).round().clamp(0, 15))


def extent(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of each group, 0 included: two [n, G]. Errors: ValueError for NaN and infinities."""
    if not torch.isfinite(w).all():
        raise ValueError("the weight holds NaN or infinity")
    x = rearrange(w, "n (G i) -> n G i", i=group)
    return x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)


def block_loss(delta: Tensor, blocks: Tensor) -> Tensor:
    """Σ over a group of delta · moment · deltaᵀ: delta [n, k], blocks [G, i, i] of the second moment -> [n, G].

    The expected square of what a group adds to the output in error.
    """
    x = rearrange(delta, "n (G i) -> G n i", i=blocks.shape[-1])
    return einsum(x @ blocks, x, "G n i, G n i -> n G")


def clipped(w: Tensor, group: int, blocks: Tensor, shrinks: tuple[float, ...]) -> Grid:
    """Per group the grid whose nearest levels lose least: both ends shrunk alike, the zero a level up or down too."""
    low, high = extent(w, group)
    if (widest := float((high - low).max())) > 15 * LARGEST:
        raise ValueError(f"a group of the weight is {widest:.3g} wide, more than 15 steps of a float16 scale")
    best: Grid | None = None
    least = torch.full_like(low, torch.inf)
    for shrink in shrinks:
        grid = between(low * shrink, high * shrink)
        for shift in (0, -1, 1):
            tried = Grid(grid.scales, (grid.zeros + shift).clamp(0, 15))
            wide = tried.spread(w.shape[1])
            loss = block_loss(wide.value(wide.snap(w)) - w, blocks)
            better = loss < least
            least = torch.where(better, loss, least)
            best = (
                tried
                if best is None
                else Grid(torch.where(better, tried.scales, best.scales), torch.where(better, tried.zeros, best.zeros))
            )
    assert best is not None
    return best


def packed(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Int4:
    """Codes [n, k] and their grid as the model's leaf."""
    group = codes.shape[1] // grid.scales.shape[1]
    check_int4(codes.shape[1], group)
    scales, zeros = (rearrange(x, "n G -> G n").to(dtype).contiguous() for x in (grid.scales, grid.zeros))
    return Int4(pack_tiles(codes.to(torch.int32)), scales, zeros, group)
