"""Quantization grids: the scales and zero points of all groups of a weight, and the search for how far to clip.

A weight [n, k] has G = k / group_size groups a row. A code 0 to 15 of a group stands for (code - zero) * scale, with a
whole zero point 0 to 15. Scales are rounded to float16, so that the grid that is searched is the grid that is stored.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from vila_triton.ops import Int4
from vila_triton.ops.int4_tiles import pack_tiles
from vila_triton.ops.int4_weight import check_int4_shape, scale_for_range

MAX_SCALE = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class QuantGrid:
    """Scales and zeros [n, G], float32; the scales are rounded to float16."""

    scales: Tensor
    zeros: Tensor

    def expand_to_columns(self, k: int) -> "QuantGrid":
        """Repeat the scale and zero point of a group for each of its columns: [n, G] -> [n, k]."""
        group_size = k // self.scales.shape[1]
        return QuantGrid(self.scales.repeat_interleave(group_size, 1), self.zeros.repeat_interleave(group_size, 1))

    def to_codes(self, w: Tensor) -> Tensor:
        """Round weights to the nearest codes, as float32. The grid has the shape of w."""
        return (w / self.scales + self.zeros).round_().clamp_(0, 15)

    def to_weights(self, codes: Tensor) -> Tensor:
        """The weights that codes stand for. The grid has the shape of codes."""
        return (codes - self.zeros) * self.scales


def grid_from_range(low: Tensor, high: Tensor) -> QuantGrid:
    """The grid whose sixteen levels reach from low <= 0 to high >= 0, both [n, G]."""
    scales = scale_for_range((high - low).clamp(max=15 * MAX_SCALE), torch.float16).float()
    return QuantGrid(scales, (-low / scales).round().clamp(0, 15))


def group_min_max(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest weight of each group of w [n, k], 0 included: two tensors [n, G].

    Errors: ValueError for a weight that holds NaN or infinity.
    """
    x = rearrange(w, "n (G i) -> n G i", i=group_size)
    low, high = x.amin(-1), x.amax(-1)
    if not (low.isfinite().all() and high.isfinite().all()):  # extremes are NaN where a weight is
        raise ValueError("the weight holds NaN or infinity")
    return low.clamp(max=0), high.clamp(min=0)


def group_hessian_loss(delta: Tensor, blocks: Tensor) -> Tensor:
    """The expected squared output error delta B deltaᵀ of each group alone.

    delta: a weight error [n, k]; blocks: a diagonal block B of the Hessian, or another covariance, per group [G, i, i]
    -> [n, G].
    """
    x = rearrange(delta, "n (G i) -> G n i", i=blocks.shape[-1])
    return ((x @ blocks) * x).sum(-1).t()


def search_clipping(w: Tensor, group_size: int, blocks: Tensor, clip_ratios: tuple[float, ...]) -> QuantGrid:
    """Search the grid of each group whose nearest codes have the least `group_hessian_loss`.

    The candidates shrink the range of a group by each of clip_ratios and move its zero point by -1, 0 or 1.
    Errors: ValueError for a weight that is not finite, or with a group too wide for float16 scales.
    """
    low, high = group_min_max(w, group_size)
    if (widest := float((high - low).max())) > 15 * MAX_SCALE:
        raise ValueError(f"a group of the weight is {widest:.3g} wide, more than 15 steps of a float16 scale")
    best: QuantGrid | None = None
    lowest_loss = torch.full_like(low, torch.inf)
    for clip_ratio in clip_ratios:
        grid = grid_from_range(low * clip_ratio, high * clip_ratio)
        for zero_offset in (0, -1, 1):
            candidate = QuantGrid(grid.scales, (grid.zeros + zero_offset).clamp(0, 15))
            columns = candidate.expand_to_columns(w.shape[1])
            loss = group_hessian_loss(columns.to_weights(columns.to_codes(w)) - w, blocks)
            better = loss < lowest_loss
            lowest_loss = torch.where(better, loss, lowest_loss)
            best = best or candidate
            best = QuantGrid(
                torch.where(better, candidate.scales, best.scales), torch.where(better, candidate.zeros, best.zeros)
            )
    assert best is not None
    return best


def pack_int4(codes: Tensor, grid: QuantGrid, dtype: torch.dtype) -> Int4:
    """Pack codes [n, k] and their grid into an `Int4` with scales and zeros of the given dtype."""
    group_size = codes.shape[1] // grid.scales.shape[1]
    check_int4_shape(codes.shape[1], group_size)
    scales, zeros = (rearrange(x, "n G -> G n").to(dtype).contiguous() for x in (grid.scales, grid.zeros))
    return Int4(pack_tiles(codes.to(torch.int32)), scales, zeros, group_size)
