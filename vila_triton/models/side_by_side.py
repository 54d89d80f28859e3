"""Tensors that lie side by side in one storage: consecutive parts of one contiguous tensor, along one of its axes."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor


def joined_shape(parts: Sequence[Any], axis: int) -> list[int]:
    """The shape of specs or tensors side by side along an axis."""
    shape = list(parts[0].shape)
    shape[axis] = sum(x.shape[axis] for x in parts)
    return shape


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def split_storage(whole: Tensor, parts: Sequence[Any], axis: int) -> tuple[Tensor, ...]:
    """The views of a tensor that specs or tensors are which lie side by side in it."""
    return whole.split([x.shape[axis] for x in parts], axis)


def could_be_one(parts: Sequence[Any], axis: int) -> bool:
    """True for tensors in memory that are alike but for their length along an axis."""
    first, others = parts[0], (slice(0, axis), slice(axis + 1, None))
    return all(
        isinstance(x, Tensor)
        and (type(x), x.device, x.dtype) == (type(first), first.device, first.dtype)
        and x.device.type != "meta"
        and all(x.shape[axes] == first.shape[axes] for axes in others)
        for x in parts
    )


def lie_side_by_side(parts: Sequence[Any], axis: int) -> bool:
    """True for tensors that are consecutive parts of one contiguous tensor."""
    if not could_be_one(parts, axis):
        return False
    strides = contiguous_strides(joined_shape(parts, axis))
    lengths = [x.shape[axis] * strides[axis] * x.element_size() for x in parts]
    return (
        len({x.untyped_storage().data_ptr() for x in parts}) == 1
        and all(x.stride() == strides for x in parts)
        and [x.data_ptr() for x in parts] == [*accumulate(lengths[:-1], initial=parts[0].data_ptr())]
    )


def whole_of(parts: Sequence[Tensor], axis: int) -> Tensor:
    """The tensor of which tensors that lie side by side are the parts: a view of their storage, without a gradient."""
    shape = joined_shape(parts, axis)
    return parts[0].detach().as_strided(shape, contiguous_strides(shape))


def lay_side_by_side(parts: Sequence[Tensor], axis: int) -> tuple[Tensor, ...]:
    """The same numbers as views of one new storage; the tensors themselves if they lie so already, or cannot."""
    if lie_side_by_side(parts, axis) or not could_be_one(parts, axis):
        return tuple(parts)
    whole = torch.empty(joined_shape(parts, axis), dtype=parts[0].dtype, device=parts[0].device)
    views = split_storage(whole, parts, axis)
    for view, x in zip(views, parts, strict=True):  # no `torch.cat`, which autocast would do in another dtype
        view.copy_(x.detach())
    return views
