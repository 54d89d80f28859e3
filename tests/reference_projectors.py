"""Every released projector from torch's modules, layer by layer as its checkpoint is numbered."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def downsample(x: Tensor, order: str, n: int = 2) -> Tensor:
    """The closed form: x [b, side², m] -> [b, S², n²·m]; block (i, j) is token j·S + i (column) or i·S + j (row)."""
    side = round(x.shape[1] ** 0.5)
    S = -(-side // n)
    out = x.new_zeros(len(x), S * S, n * n, x.shape[2])
    for i in range(S):
        for j in range(S):
            for corner, (y, z) in enumerate([(n * i + p, n * j + q) for p in range(n) for q in range(n)]):
                if y < side and z < side:
                    out[:, j * S + i if order == "column" else i * S + j, corner] = x[:, y * side + z]
    return out.flatten(2)


class Downsample(nn.Module):
    def __init__(self, n: int, order: str):
        super().__init__()
        self.n, self.order = n, order

    def forward(self, x: Tensor) -> Tensor:
        return downsample(x, self.order, self.n)


def layers(kind: str, m: int, e: int, order: str = "row") -> nn.Module:
    """The layers of a projector from m to e numbers."""
    L, N, G = nn.Linear, nn.LayerNorm, nn.GELU
    two, three, t = Downsample(2, order), Downsample(3, order), m // 3
    table: dict[str, list[nn.Module]] = {
        "mlp1x_gelu": [L(m, e)],
        "mlp2x_gelu": [L(m, e), G(), L(e, e)],
        "mlp4x_gelu": [L(m, e), G(), L(e, e), G(), L(e, e), G(), L(e, e)],
        "mlp_downsample": [two, N(4 * m), L(4 * m, e), G(), L(e, e)],
        "mlp_downsample_2x2_fix": [two, N(4 * m), L(4 * m, e), G(), L(e, e)],
        "mlp_downsample_3x3_fix": [three, N(9 * m), L(9 * m, 3 * m), G(), N(3 * m), L(3 * m, e), G(), L(e, e)],
        "mlp_downsample_3x3_s2": [
            *(three, N(9 * m), L(9 * m, 3 * m), G(), N(3 * m), L(3 * m, m), G(), N(m), L(m, t)),
            *(G(), N(t), L(t, e), G(), L(e, e)),
        ],
        "mlp_downsample_3x3_s2_new": [
            *(three, N(9 * m), L(9 * m, 4 * m), G(), N(4 * m), L(4 * m, 2 * m), G(), N(2 * m), L(2 * m, m)),
            *(G(), N(m), L(m, t), G(), N(t), L(t, e), G(), L(e, e)),
        ],
    }
    return {"identity": nn.Identity(), "linear": L(m, e)}.get(kind) or nn.Sequential(*table[kind])


class Projector(nn.Module):
    """The projector of a mm_projector/config.json with the tensors of a checkpoint, in their dtype."""

    def __init__(self, values: Mapping[str, Any], m: int, e: int, tensors: Mapping[str, Tensor]):
        super().__init__()
        kind = values["mm_projector_type"]
        self.layers = layers(kind, m, e, values.get("token_order", "column" if kind == "mlp_downsample" else "row"))
        self.to(next(iter(tensors.values()), torch.empty(0)).dtype).load_state_dict(tensors)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
