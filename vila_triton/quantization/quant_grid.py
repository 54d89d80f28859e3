"""Sixteen levels a group: where they lie (`Grid`), which is nearest, and how far to clip.

A weight [n, k] is cut into G = k / group runs of inputs. The levels of a run are (code - zero) · scale, code and zero
whole numbers 0 to 15; the scale is a number of float16, so that what is stored is what was searched for.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from vila_triton.ops import Int4
from vila_triton.ops.int4 import check_int4_shape, scale_for_range
from vila_triton.ops.int4_tiles import pack_tiles

MAX_SCALE = torch.finfo(torch.float16).max  # scale


@dataclass(frozen=True)
class QuantGrid:
    """scales and zeros [n, G] float32, the scales rounded to float16."""

    scales: Tensor
    zeros: Tensor

    def expand_to_columns(self, k: int) -> "QuantGrid":
        """One column an input: [n, k]."""
        group_size = k // self.scales.shape[1]
        return QuantGrid(self.scales.repeat_interleave(group_size, 1), self.zeros.repeat_interleave(group_size, 1))

    def to_codes(self, w: Tensor) -> Tensor:
        """The nearest codes to weights that lie as the grid does, [n, k] by [n, k]; float32."""
        return (w / self.scales + self.zeros).round_().clamp_(0, 15)

    def to_weights(self, codes: Tensor) -> Tensor:
        """The weights that codes stand for."""
        return (codes - self.zeros) * self.scales


def grid_from_range(low: Tensor, high: Tensor) -> QuantGrid:
    """The grid from low <= 0 to high >= 0, [n, G]."""
    scales = scale_for_range((high - low).clamp(max=15 * MAX_SCALE), torch.float16).float()
    return QuantGrid(scales, (-low / scales).round().clamp(0, 15))


def group_min_max(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of each group, 0 included: two [n, G]. Errors: ValueError for NaN and infinities."""
    if not torch.isfinite(w).all():
        raise ValueError("the weight holds NaN or infinity")
    x = rearrange(w, "n (G i) -> n G i", i=group_size)
    return x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)


def group_hessian_loss(delta: Tensor, blocks: Tensor) -> Tensor:
    """Σ over a group of delta · moment · deltaᵀ: delta [n, k], blocks [G, i, i] of the second moment -> [n, G].

    The expected square of what a group adds to the output in error.
    """
    x = rearrange(delta, "n (G i) -> G n i", i=blocks.shape[-1])
    return einsum(x @ blocks, x, "G n i, G n i -> n G")


def search_clipping(w: Tensor, group_size: int, blocks: Tensor, clip_ratios: tuple[float, ...]) -> QuantGrid:
    """Per group the grid whose nearest levels lose least: both ends shrunk alike, the zero a level up or down too."""
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
            best = (
                candidate
                if best is None
                else QuantGrid(
                    torch.where(better, candidate.scales, best.scales), torch.where(better, candidate.zeros, best.zeros)
                )
            )
    assert best is not None
    return best


def pack_int4(codes: Tensor, grid: QuantGrid, dtype: torch.dtype) -> Int4:
    """Codes [n, k] and their grid as the model's leaf."""
    group_size = codes.shape[1] // grid.scales.shape[1]
    check_int4_shape(codes.shape[1], group_size)
    scales, zeros = (rearrange(x, "n G -> G n").to(dtype).contiguous() for x in (grid.scales, grid.zeros))
    return Int4(pack_tiles(codes.to(torch.int32)), scales, zeros, group_size)
