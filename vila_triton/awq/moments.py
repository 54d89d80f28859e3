"""Second moments of a linear's inputs: all that rounding needs to know of calibration."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """E[x xᵀ] of the inputs that a rounded linear gets, damped, and what follows from it.

    second       [k, k]     E[x xᵀ]
    inverse      [k, k]
    conditional  [G, i, i]  for each group, of what is left of its inputs when all others have done their best to stand
                            in for them: what matters to a group whose errors the other inputs make good
    mean_abs     [k]        E|x|
    """

    second: Tensor
    inverse: Tensor
    conditional: Tensor
    mean_abs: Tensor

    def scaled(self, s: Tensor) -> "Moments":
        """Of x / s, s [k]."""
        G, i, _ = self.conditional.shape
        blocks = s.view(G, i)
        return Moments(
            self.second / (s[:, None] * s),
            self.inverse * (s[:, None] * s),
            self.conditional / (blocks[:, :, None] * blocks[:, None]),
            self.mean_abs / s,
        )


def moments(x: Tensor, weights: Tensor, group: int) -> Moments:
    """x [s, k], weights [s] of mean 1.

    The diagonal is raised by a share of its mean, the larger the fewer tokens there are for the k² numbers: what
    calibration happened not to show is not free. Errors: ValueError for inputs that are not finite.
    """
    k = x.shape[1]
    second = (x * weights[:, None]).T @ x / len(x)
    if not torch.isfinite(second).all():
        raise ValueError("calibration gives this linear inputs that are NaN or infinite")
    damp = (0.01 + 0.5 * k / len(x)) * second.diagonal().mean().clamp(min=1e-12)
    second.diagonal().add_(damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
    blocks = torch.stack([inverse[i : i + group, i : i + group] for i in range(0, k, group)])
    return Moments(second, inverse, torch.linalg.inv(blocks), (x.abs() * weights[:, None]).mean(0))


def stand_in(wanted: Tensor, got: Tensor, weights: Tensor, known: Moments) -> Tensor:
    """The map [k, k] by which inputs `got` [s, k] come nearest to `wanted`: w @ it does on got what w did on wanted.

    Least squares, held near the identity by the damping of `known`, the moments of `got`.
    """
    drift = ((wanted - got) * weights[:, None]).T @ got / len(got)
    shift = drift @ known.inverse
    shift.diagonal().add_(1)
    return shift
