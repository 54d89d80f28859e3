"""A kernel that Triton interprets is refused inside `emulating`, with the reason."""

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from bench.emulator import emulating


@triton.jit
def one_kernel(out_ptr):
    tl.store(out_ptr, 1)


@pytest.mark.skipif(not knobs.runtime.interpret, reason="kernels are compiled here")
def test_interpreted_kernels_are_refused() -> None:
    out = torch.zeros(1)
    with (
        emulating("sm_80"),
        pytest.raises(RuntimeError, match="one_kernel is interpreted, not compiled: TRITON_INTERPRET"),
    ):
        one_kernel[(1,)](out)
    one_kernel[(1,)](out)
    assert out == 1
