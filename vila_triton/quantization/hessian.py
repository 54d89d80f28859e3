"""The Hessian of a linear's inputs, and the weight correction for inputs that quantization has changed."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HessianInfo:
    """The damped Hessian H = E[x xᵀ] of a linear's k inputs, and what GPTQ derives from it.

    hessian           [k, k]     each token counts by its weight
    act_order         [k]        columns by falling conditional variance 1 / (H⁻¹)[j, j]
    inverse_cholesky  [k, k]     upper triangular U with Uᵀ U = H⁻¹, rows and columns in act_order
    schur_blocks      [G, i, i]  per group of i columns, the inverse of its block of H⁻¹ (a Schur complement of H): the
                                 covariance of its inputs given all others. It weighs the errors of a group, since GPTQ
                                 compensates what the other inputs can express.
    mean_abs          [k]        E|x|
    """

    hessian: Tensor
    act_order: Tensor
    inverse_cholesky: Tensor
    schur_blocks: Tensor
    mean_abs: Tensor


def compute_hessian(x: Tensor, weights: Tensor, group_size: int) -> HessianInfo:
    """Compute the damped Hessian of inputs x [s, k]; token i counts weights[i], [s] of mean 1.

    The damping is a share of the diagonal's mean that grows with k / s: directions that calibration did not show still
    cost something. At most four [k, k] matrices are in memory at a time.
    Errors: ValueError for inputs that are not finite, or whose squares overflow.
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
    schur_blocks = torch.linalg.inv(inverse_blocks)
    return HessianInfo(hessian, act_order, inverse_cholesky, schur_blocks, (x.abs() * weights[:, None]).mean(0))


def error_correction_map(original: Tensor, quantized: Tensor, weights: Tensor, hessian: HessianInfo) -> Tensor:
    """The correction C [k, k] of weights for quantized inputs: (w @ C) x̂ is on average closest to w @ x.

    original: inputs x [s, k] in the original model; quantized: x̂ [s, k] behind the quantized layers; weights [s];
    hessian: that of the quantized inputs, whose damping keeps C near the identity.
    C = I + E[(x - x̂) x̂ᵀ] H⁻¹, as in QEP (Arai & Ichikawa 2025).
    """
    correction = ((original - quantized) * weights[:, None]).T @ quantized / len(quantized)
    correction = correction[:, hessian.act_order]
    correction = correction @ hessian.inverse_cholesky.T
    correction = correction @ hessian.inverse_cholesky
    correction = correction[:, hessian.act_order.argsort()]
    correction.diagonal().add_(1)
    return correction
