"""S2, "scaling on scales" (Shi et al. 2024): one tower encodes an image at several sizes, the larger ones in tiles."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vila_triton.ops.dtypes import upcast


def resize_to_scale(pixels: Tensor, size: int) -> Tensor:
    """Resize images [b, c, H, W] -> [b, c, size, size], bicubic."""
    return F.interpolate(upcast(pixels), size=size, mode="bicubic").to(pixels.dtype)


def split_into_tiles(pixels: Tensor, n: int) -> Tensor:
    """Cut images [b, c, n·tile, n·tile] -> tiles [n·n·b, c, tile, tile], all images' first tiles first."""
    return rearrange(pixels, "b c (i y) (j x) -> (i j b) c y x", i=n, j=n)


def merge_scales(scale_features: Sequence[Tensor], tiles_per_side: Sequence[int]) -> Tensor:
    """Merge the features of all scales: tiles [n·n·b, grid², e] of each scale -> images [b, grid², scales·e].

    The tiles of each scale are put together to one map and averaged down to the grid of the first, smallest scale.
    tiles_per_side: n of each scale.
    """
    grid = math.isqrt(scale_features[0].shape[1])
    maps = [
        rearrange(x, "(i j b) (y x) e -> b e (i y) (j x)", i=n, j=n, y=grid)
        for x, n in zip(scale_features, tiles_per_side, strict=True)
    ]
    target = maps[0].shape[-2:]
    downsampled = [F.interpolate(upcast(x), size=target, mode="area").to(x.dtype) for x in maps]
    return rearrange(torch.cat(downsampled, dim=1), "b e y x -> b (y x) e")
