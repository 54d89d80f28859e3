"""The launches of `bench.emulator.tutorials`, here of kernels that take the same arguments as those of the tutorials.

They have what our own kernels do not: random numbers, loops over rows that are pipelined, locks of atomics between
blocks of the grid, tensor descriptors made in the kernel.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from bench.emulator import KernelFault, emulating, tutorials


@triton.jit
def softmax_kernel(out_ptr, x_ptr, stride_xm, stride_om, m, n, BLOCK_SIZE: tl.constexpr, num_stages: tl.constexpr):
    offs = tl.arange(0, BLOCK_SIZE)
    for row in tl.range(tl.program_id(0), m, tl.num_programs(0), num_stages=num_stages):
        x = tl.load(x_ptr + row * stride_xm + offs, mask=offs < n, other=-float("inf"))
        x = tl.exp(x - tl.max(x, 0))
        tl.store(out_ptr + row * stride_om + offs, x / tl.sum(x, 0), mask=offs < n)


@triton.jit
def dropout_kernel(x_ptr, keep_ptr, out_ptr, n, p, BLOCK_SIZE: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    keep = tl.load(keep_ptr + offs, mask=offs < n) != 0
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, tl.where(keep, x / (1 - p), 0.0), mask=offs < n)


@triton.jit
def seeded_dropout_kernel(x_ptr, out_ptr, n, p, seed, BLOCK_SIZE: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, tl.where(tl.rand(seed, offs) > p, x / (1 - p), 0.0), mask=offs < n)


@triton.jit
def norm_kernel(x_ptr, y_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, stride, n, eps, BLOCK_SIZE: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK_SIZE)
    mask = offs < n
    x = tl.load(x_ptr + row * stride + offs, mask=mask, other=0.0)
    mean = tl.sum(x, 0) / n
    centered = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 0) / n + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    y = centered * rstd * tl.load(w_ptr + offs, mask=mask) + tl.load(b_ptr + offs, mask=mask)
    tl.store(y_ptr + row * stride + offs, y, mask=mask)


@triton.jit
def add_row_under_lock(ptr, row, mask, first):
    """Adds a row to the one at ptr, or stores it if it is the first."""
    if not first:
        row += tl.load(ptr, mask=mask)
    tl.store(ptr, row, mask=mask)


@triton.jit
def norm_gradient_kernel(
    dx_ptr, dy_ptr, dw_ptr, db_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, locks_ptr, stride, n,
    GROUP_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, RELEASE: tl.constexpr = "acq_rel",
):  # fmt: skip
    """Rows that share a lock add to the same row of dw and db."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK_SIZE_N)
    mask = offs < n
    x = tl.load(x_ptr + row * stride + offs, mask=mask, other=0.0)
    dy = tl.load(dy_ptr + row * stride + offs, mask=mask, other=0.0)
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + row)
    normed = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
    along, mean = tl.sum(normed * w * dy, 0) / n, tl.sum(w * dy, 0) / n
    tl.store(dx_ptr + row * stride + offs, (w * dy - normed * along - mean) * rstd, mask=mask)
    lock = row % GROUP_SIZE_M
    while tl.atomic_cas(locks_ptr + lock, 0, 1) == 1:
        pass
    count_ptr = locks_ptr + GROUP_SIZE_M + lock
    first = tl.load(count_ptr) == 0
    add_row_under_lock(dw_ptr + lock * n + offs, dy * normed, mask, first)
    add_row_under_lock(db_ptr + lock * n + offs, dy, mask, first)
    tl.store(count_ptr, 1)
    tl.debug_barrier()
    tl.atomic_xchg(locks_ptr + lock, 0, sem=RELEASE)


@triton.jit
def column_sums_kernel(
    dw_ptr, db_ptr, out_w_ptr, out_b_ptr, m, n, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr
):
    offs_n = tl.program_id(0) * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    offs_m = tl.arange(0, BLOCK_SIZE_M)
    mask = (offs_m[:, None] < m) & (offs_n < n)
    dw = tl.load(dw_ptr + offs_m[:, None] * n + offs_n, mask=mask, other=0.0)
    db = tl.load(db_ptr + offs_m[:, None] * n + offs_n, mask=mask, other=0.0)
    tl.store(out_w_ptr + offs_n, tl.sum(dw, 0), mask=offs_n < n)
    tl.store(out_b_ptr + offs_n, tl.sum(db, 0), mask=offs_n < n)


@triton.jit
def transposing_kernel(x_ptr, out_ptr, m, n, BLOCK: tl.constexpr):
    x_desc = tl.make_tensor_descriptor(x_ptr, shape=[m, n], strides=[n, 1], block_shape=[BLOCK, BLOCK])
    out_desc = tl.make_tensor_descriptor(out_ptr, shape=[n, m], strides=[m, 1], block_shape=[BLOCK, BLOCK])
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    out_desc.store([column, row], x_desc.load([row, column]).T)


KERNELS = SimpleNamespace(
    softmax_kernel=softmax_kernel,
    _dropout=dropout_kernel,
    _seeded_dropout=seeded_dropout_kernel,
    _layer_norm_fwd_fused=norm_kernel,
    _layer_norm_bwd_dx_fused=norm_gradient_kernel,
    _layer_norm_bwd_dwdb=column_sums_kernel,
)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("launch", [tutorials.softmax, tutorials.dropout, tutorials.layer_norm])
def test_kernels_compute_what_torch_does(launch: tutorials.Launch, target: str) -> None:
    torch.manual_seed(0)
    with emulating(target):
        outputs = launch(KERNELS)
    assert all(tutorials.error_over_allowed(*results) <= 1 for results in outputs.values())


def test_a_lock_that_releases_nothing_is_a_race_between_blocks() -> None:
    m, n = 4, 64
    x, out, grad = torch.randn(3, m, n)
    w, mean, rstd = torch.ones(n), torch.zeros(m), torch.ones(m)
    sums, locks = torch.zeros(2, 2, n), torch.zeros(4, dtype=torch.int32)
    with emulating("sm_80"), pytest.raises(KernelFault, match="blocks race"):
        norm_gradient_kernel[(m,)](
            out, grad, *sums, x, w, mean, rstd, locks, n, n,
            GROUP_SIZE_M=2, BLOCK_SIZE_N=64, RELEASE="relaxed",
        )  # fmt: skip


def test_descriptors_made_in_a_kernel_are_plain_addresses_before_sm_90() -> None:
    x, out = torch.randn(40, 32), torch.zeros(32, 40)
    with emulating("sm_80"):
        transposing_kernel[(3, 2)](x, out, 40, 32, BLOCK=16)
    assert torch.equal(out, x.mT)
    with emulating("sm_90"), pytest.raises(NotImplementedError, match=r"(?s)transposing_kernel.*test_tutorials.py:"):
        transposing_kernel[(3, 2)](x, out, 40, 32, BLOCK=16)


def test_only_definitions_of_a_tutorial_are_run(tmp_path: Path) -> None:
    (tmp_path / "tutorial.py").write_text(
        "import no_such_module\nDEVICE = 3\nx = 1 / 0\ndef add(x): return x + DEVICE\ndef test_add(): pass\nadd(None)\n"
    )
    assert vars(tutorials.load_definitions(tmp_path / "tutorial.py")).keys() >= {"DEVICE", "add"}
    assert not hasattr(tutorials.load_definitions(tmp_path / "tutorial.py"), "test_add")
