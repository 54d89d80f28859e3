"""A launch that counts arrivals and ends in an error in the middle leaves nothing to the next."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.correctness.error_budget import example_args
from vila_triton.kernels import _splitk_reduce, decode_attention  # pyright: ignore
from vila_triton.ops import decode_attention as decode_attention_op
from vila_triton.ops import int4_matmul
from vila_triton.registry import Op, discover

discover()
PRODUCT = {"m": 3, "n": 17, "G": 4, "group": 128, "dtype": "float32", "order": "sub", "bias": True, "residual": True}


def interrupted_after(arrivals: int, arrives_last: Callable[..., Any]) -> Callable[..., Any]:
    """arrives_last, but the program after so many arrivals is interrupted."""
    counted = 0

    def interrupted(*args: Any) -> Any:
        nonlocal counted
        counted += 1
        if counted > arrivals:
            raise KeyboardInterrupt
        return arrives_last(*args)

    return interrupted


@pytest.mark.parametrize(
    "op, name, module, sizes",
    [
        (int4_matmul, "splitk", _splitk_reduce, PRODUCT),
        (int4_matmul, "gemv", _splitk_reduce, PRODUCT),
        (
            decode_attention_op,
            "triton",
            decode_attention,
            {"b": 1, "t": 1100, "g": 1, "ratio": 2, "d": 32, "l": 16, "dtype": "float32", "kv": "plain"},
        ),
    ],
    ids=["splitk", "gemv", "decode_attention"],
)
def test_an_interrupted_launch_does_not_change_the_next(
    op: Op, name: str, module: Any, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    impl, args = op.impls[name], example_args(op, 0, **sizes)
    config = {**impl.configs[0], **({"SPLIT_K": 4} if op is int4_matmul else {})}
    expected = impl(*args, config=config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "arrives_last", interrupted_after(1, module.arrives_last))
        impl(*args, config=config)
    for _ in range(2):
        assert torch.equal(impl(*args, config=config), expected)
