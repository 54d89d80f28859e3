"""Linear maps of the same input as one: their leaves lie side by side in one storage, of which each is a view.

One product then does for all of them, and no byte is held twice. They are joined along their outputs: rows of a weight
[n, k], whole tiles of an int4 weight, columns of its scales and zeros [G, n], which are therefore strided views.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vila_triton.ops import Int4
from vila_triton.ops.int4_tiles import TILE_N

from .layers import Affine, Leaf
from .side_by_side import lie_side_by_side, whole_of

INT4_AXES = {"qweight": 0, "scales": 1, "zeros": 1}  # of outputs, or tiles of them
Group = tuple[tuple[Leaf, ...], int]  # one leaf of each of several linears, or its spec, and the axis of their outputs


def leaf_groups(*linears: Affine) -> list[Group]:
    """The leaves that linears join, kind by kind in the order of declaration; none if they cannot be one linear.

    They cannot if they differ in inputs, dtype, group size or rounding, if only some are int4 or have a bias, or if a
    tile of an int4 weight would hold rows of two of them.
    """
    weights, biases = [p.weight for p in linears], [p.bias for p in linears]
    is_int4 = {isinstance(w, Int4) for w in weights}
    has_bias = {bias is not None for bias in biases}
    if len(is_int4) > 1 or len(has_bias) > 1 or len({w.shape[1] for w in weights}) > 1:
        return []
    groups: list[Group] = [(tuple(weights), 0)]
    if True in is_int4:
        if len({(w.group_size, w.rounding) for w in weights}) > 1 or any(w.shape[0] % TILE_N for w in weights):
            return []
        groups = [(tuple(getattr(w, name) for w in weights), axis) for name, axis in INT4_AXES.items()]
    if True in has_bias:
        groups.append((tuple(biases), 0))
    return groups if all(len({x.dtype for x in parts}) == 1 for parts, _ in groups) else []


def affine_of(leaves: Sequence[Any], like: Affine) -> Affine:
    """The linear of these leaves, in the order of `leaf_groups`, of the kind of another; without low-rank terms."""
    w, rest = like.weight, iter(leaves)
    weight = Int4(next(rest), next(rest), next(rest), w.group_size, w.rounding) if isinstance(w, Int4) else next(rest)
    return Affine(weight, next(rest, None))


def joined(*linears: Affine) -> Affine | None:
    """The linear of the outputs of all, a view of the storage in which their leaves lie side by side; None if they do
    not. It has no gradient: see `with_gradients`. Low-rank terms stay with the parts, to whose results they are added.
    """
    weights = [p.weight.scales if isinstance(p.weight, Int4) else p.weight for p in linears]
    groups = leaf_groups(*linears) if all(isinstance(w, Tensor) for w in weights) else []
    if not groups or not all(lie_side_by_side(parts, axis) for parts, axis in groups):
        return None
    return affine_of([whole_of(parts, axis) for parts, axis in groups], linears[0])


class WholeOfParts(torch.autograd.Function):
    """A tensor of which others are the parts, and whose gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, axis: int, *parts: Tensor) -> Tensor:
        ctx.axis = axis
        ctx.save_for_backward(*parts)
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        parts = ctx.saved_tensors  # torch raises RuntimeError here if one was written to since
        return None, None, *grads[0].split([x.shape[ctx.axis] for x in parts], ctx.axis)


def with_gradients(whole: Affine, *linears: Affine) -> Affine:
    """`joined` linears, such that the gradients of what they compute reach them where that is asked for."""
    if not torch.is_grad_enabled():
        return whole
    groups = leaf_groups(*linears)
    if not any(x.requires_grad for parts, _ in groups for x in parts):
        return whole
    leaves = [
        WholeOfParts.apply(x, axis, *parts) if x.is_floating_point() else x
        for (parts, axis), ((x,), _) in zip(groups, leaf_groups(whole), strict=True)
    ]
    return affine_of(leaves, whole)
