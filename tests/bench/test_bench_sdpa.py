"""torch's back ends as peers of attention: right on the CPU's flash one, and not timed while they leave the pages."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch

from vila_triton.ops import decode_attention, prefill_attention
from vila_triton.registry import Unsupported

SIZES: dict[str, Any] = {"t": 37, "g": 2, "ratio": 2, "d": 32, "l": 16, "dtype": "float32"}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The peers, attached for the time of a test."""
    for op in (decode_attention, prefill_attention):
        others = {name: impl for name, impl in op.impls.items() if not name.startswith("sdpa")}
        monkeypatch.setattr(op, "impls", others)
    before = sys.modules.pop("bench.peers.sdpa", None)
    yield importlib.import_module("bench.peers.sdpa")
    del sys.modules["bench.peers.sdpa"]
    if before:
        sys.modules["bench.peers.sdpa"] = before


@pytest.mark.parametrize("op, sizes", [(decode_attention, {}), (prefill_attention, {"s": 9, "t": 0})], ids=str)
def test_pages_are_left_once(op: Any, sizes: dict[str, int], peer: Any) -> None:
    flash = op.impls["sdpa_flash"].fn
    one, two = (
        op.make_example(**SIZES | {"b": b} | sizes, rng=torch.Generator().manual_seed(0), device="cpu") for b in (1, 2)
    )
    with patch.object(peer, "gather_tokens", wraps=peer.gather_tokens) as gather_tokens:
        for _ in range(3):
            torch.testing.assert_close(flash(*one), op.reference(*one))
    assert gather_tokens.call_count == 2  # of the keys and of the values
    with pytest.raises(Unsupported, match="sdpa_flash: 2 sequences of different lengths, expected one"):
        flash(*two)
