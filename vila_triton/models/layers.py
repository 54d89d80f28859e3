"""The two layers that all parts are made of: a weight with a bias, applied as a linear map or as a layer norm.

A linear map may have low-rank terms beside its weight, the adapters of LoRA (Hu et al. 2021).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton import ops
from vila_triton.ops import Int4

from .params import ParameterSpec, weight_spec

# A ParameterSpec or a Tensor; a linear's weight may also be an Int4 of either.
Leaf = Any


@dataclass(frozen=True)
class LowRank:
    """A term scaling · b · a of a linear map [n, k], of rank r, that is added to its weight."""

    a: Leaf  # [r, k]
    b: Leaf  # [n, r]
    scaling: float
    dropout: float = 0.0  # the probability with which an input of this term, not of the weight, is 0; in training only


@dataclass(frozen=True)
class Affine:
    """A weight and a bias: of a linear map or of a norm."""

    weight: Leaf  # [n, k] of a linear map, [e] of a norm
    bias: Leaf | None  # [n] or [e]
    low_rank: tuple[LowRank, ...] = ()  # of a linear map only


def linear_specs(
    n: int,
    k: int,
    key: str,
    dtype: torch.dtype,
    bias: bool = True,
    group_size: int | None = None,
    rounding: str = "sub",
) -> Affine:
    """Specs of a linear map from k inputs to n outputs, in int4 if `group_size` is given."""
    return Affine(
        weight_spec(n, k, key, dtype, group_size, rounding),
        ParameterSpec((n,), f"{key}.bias", dtype, "zeros") if bias else None,
    )


def norm_specs(e: int, key: str, dtype: torch.dtype) -> Affine:
    """Specs of a layer norm over e values."""
    return Affine(
        ParameterSpec((e,), f"{key}.weight", dtype, "ones"), ParameterSpec((e,), f"{key}.bias", dtype, "zeros")
    )


def linear(p: Affine, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply a linear map and add a residual, if one is given: x [..., k] and residual [..., n] -> [..., n]."""
    product = ops.int4_matmul if isinstance(p.weight, Int4) else ops.linear  # to which `ops.linear` would go, too
    if residual is not None and residual.dtype != x.dtype:  # under autocast, where products alone are in half precision
        out = product(x, p.weight, p.bias) + residual
    else:
        out = product(x, p.weight, p.bias, residual)
    return add_low_rank(p.low_rank, x, out) if p.low_rank else out


def add_low_rank(terms: tuple[LowRank, ...], x: Tensor, out: Tensor) -> Tensor:
    """Add the low-rank terms of a linear map to its result, in its dtype: x [..., k], out [..., n] -> [..., n].

    A term is computed in its own dtype: peft keeps adapters of a model of 16 bits in float32.
    """
    for term in terms:
        inputs = F.dropout(x.to(term.a.dtype), term.dropout) if term.dropout else x.to(term.a.dtype)
        hidden = ops.linear(inputs, term.a) * term.scaling  # [..., r]
        if hidden.dtype == out.dtype:
            out = ops.linear(hidden, term.b, None, out)  # [..., n]
        else:
            out = (out + ops.linear(hidden, term.b)).to(out.dtype)  # [..., n]
    return out


LinearFn = Callable[[Affine, Tensor], Tensor]  # `linear`, or a function that also records or quantizes


def layer_norm(p: Affine, x: Tensor, eps: float) -> Tensor:
    """Apply a layer norm: x [..., e] -> [..., e]."""
    assert p.bias is not None
    return ops.layer_norm(x, p.weight, p.bias, eps)
