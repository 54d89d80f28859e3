"""A type checker takes an op for a function with the signature of its reference: pyright checks this file in CI."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=error

from typing import Any, assert_type

import pytest
import torch
from torch import Tensor

from vila_triton.ops import Int4, KVPages, encoder_attention, int4_matmul, kv_write, rope_kv_write


def test_results_have_the_types_of_the_references() -> None:
    x, w = torch.ones(2, 32), Int4.pack(torch.ones(4, 32), group_size=32)
    assert_type(w, Int4)
    assert assert_type(int4_matmul(x, w, residual=torch.ones(2, 4)), Tensor).shape == (2, 4)
    heads = torch.ones(1, 3, 2, 16)
    assert assert_type(encoder_attention(heads, heads, heads, 0.25), Tensor | Any).shape == heads.shape
    out, lse = encoder_attention(heads, heads, heads, 0.25, return_lse=True)
    assert (out.shape, lse.shape) == (heads.shape, heads.shape[:3])
    pages, slots = torch.zeros(1, 16, 2, 16), torch.arange(3)
    written = assert_type(kv_write(heads[0], heads[0], pages, pages.clone(), slots), tuple[KVPages, KVPages])
    angles = torch.ones(3, 8)
    rotated = rope_kv_write(heads[0], heads[0], heads[0], angles, angles, *written, slots)
    assert_type(rotated, tuple[Tensor, Tensor, KVPages, KVPages])


def test_wrong_arguments_are_seen_by_a_type_checker_and_at_the_call() -> None:
    x, w = torch.ones(2, 32), Int4.pack(torch.ones(4, 32), 32)
    with pytest.raises(ValueError, match="w is a Tensor, expected an Int4"):
        int4_matmul(x, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="group_size"):
        int4_matmul(x, w, group_size=32)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="missing"):
        int4_matmul(x)  # pyright: ignore[reportCallIssue]
