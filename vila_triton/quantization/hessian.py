"""Second moments of a linear's inputs: all that rounding needs to know of calibration."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HessianInfo:
    """E[x xᵀ] of the inputs that a rounded linear gets, damped, and what follows from it.

    second       [k, k]     E[x xᵀ]
    order        [k]        inputs, the loudest first: by what of each the others cannot stand in for
    upper        [k, k]     triangular, upperᵀ upper the inverse of `second` in that order
    conditional  [G, i, i]  for each group, of what is left of its inputs when all others have done their best to stand
                            in for them: what matters to a group whose errors the other inputs make good
    mean_abs     [k]        E|x|
    """

    hessian: Tensor
    act_order: Tensor
    inverse_cholesky: Tensor
    schur_blocks: Tensor
    mean_abs: Tensor


def compute_hessian(x: Tensor, weights: Tensor, group_size: int) -> HessianInfo:
    """x [s, k], weights [s] of mean 1. Of k² numbers four times as many as there are in the result's largest are held.

    The diagonal is raised by a share of its mean, the larger the fewer tokens there are for the k² numbers: what
    calibration happened not to show is not free. Errors: ValueError for inputs that are not finite, or too large.
    """
    k = x.shape[1]
    if not torch.isfinite(x).all():
        raise ValueError("its inputs are NaN or infinite, by calibration or by the weights before it")
    hessian = (x * weights[:, None]).T @ x / len(x)
    if not torch.isfinite(hessian).all():
        raise ValueError(f"the squares of its inputs, up to {float(x.abs().max()):.3g}, are beyond {x.dtype}")
    damping = (0.01 + 0.5 * k / len(x)) * hessian.diagonal().mean().clamp(min=1e-12)
    hessian.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    inverse_blocks = torch.stack([inverse[i : i + group_size, i : i + group_size] for i in range(0, k, group_size)])
    act_order = inverse.diagonal().argsort(stable=True)
    inverse = inverse[act_order]  # one copy at a time
    inverse = inverse[:, act_order]
    inverse_cholesky = torch.linalg.cholesky(inverse, upper=True)
    return HessianInfo(
        hessian, act_order, inverse_cholesky, torch.linalg.inv(inverse_blocks), (x.abs() * weights[:, None]).mean(0)
    )


def error_correction_map(original: Tensor, quantized: Tensor, weights: Tensor, hessian: HessianInfo) -> Tensor:
    """The map [k, k] by which inputs `got` [s, k] come nearest to `wanted`: w @ it does on got what w did on wanted.

    Least squares, held near the identity by the damping of `known`, the moments of `got`.
    """
    correction = ((original - quantized) * weights[:, None]).T @ quantized / len(quantized)
    correction = correction[:, hessian.act_order]
    correction = correction @ hessian.inverse_cholesky.T
    correction = correction @ hessian.inverse_cholesky
    correction = correction[:, hessian.act_order.argsort()]
    correction.diagonal().add_(1)
    return correction
