"""The shorter way of a launch gives the driver what Triton's own way gives it."""

from unittest.mock import patch

import pytest
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from bench.measure.no_launches import DriverLaunch, without_launching
from kernels._quick_launch import QuickKernel
from kernels.rms_norm import _rms_norm_kernel
from vila_triton.ops import rms_norm
from vila_triton.registry import use

TARGET = "sm_90"


def launches(x: torch.Tensor, weight: torch.Tensor, times: int = 1) -> list[DriverLaunch]:
    """The launches that the driver is given by calls of rms_norm."""
    given: list[DriverLaunch] = []
    with without_launching(TARGET, given.append), use(rms_norm="triton"):
        for _ in range(times):
            rms_norm(x, weight, 1e-5)
    return given


def arguments(launch: DriverLaunch) -> list[object]:
    """All but the new tensor of the result, whose address differs."""
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for i, x in enumerate(launch.args) if i != 2]


@pytest.fixture(autouse=True)
def kernel() -> QuickKernel:
    """The kernel of the op, which has launched nothing."""
    assert isinstance(_rms_norm_kernel, QuickKernel)
    _rms_norm_kernel.launched.clear()
    return _rms_norm_kernel


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 64),
        torch.zeros(3, 65, dtype=torch.bfloat16)[:, 1:],
        torch.zeros(64, 1)[None, :, 0],
        torch.zeros(1, 16),
    ],
    ids=["aligned", "odd address", "one row", "few columns"],
)
def test_the_driver_is_given_the_same(x: torch.Tensor, kernel: QuickKernel) -> None:
    weight = torch.zeros(x.shape[-1], dtype=x.dtype)
    (first,) = launches(x, weight)
    assert len(kernel.launched) == 1
    with patch.object(kernel, "run", side_effect=AssertionError("Triton's own way")):
        (second,) = launches(x, weight)
    assert second.cubin == first.cubin and second.grid == first.grid and arguments(second) == arguments(first)


def test_what_a_kernel_is_specialized_by_is_told_apart(kernel: QuickKernel) -> None:
    """Addresses, dtypes and widths, one after the other and then all again, as Triton itself launches them."""
    wide = torch.zeros(4, 64)
    calls = [
        (wide, wide[0]),
        (wide.view(-1)[1:129].view(2, 64), wide[0]),
        (wide.half(), wide[0]),
        (wide[:, :1], wide[0, :1]),
    ]
    quick = [launches(*call)[0] for call in calls * 2]
    with patch.object(QuickKernel, "__getitem__", JITFunction.__getitem__):
        own = [launches(*call)[0] for call in calls]
    assert [x.cubin for x in quick] == [x.cubin for x in own * 2] and len({x.cubin for x in own}) == len(calls)
    assert len(kernel.launched) == len(calls)


def test_watched_and_replaced_launches_go_the_usual_way(kernel: QuickKernel) -> None:
    x, hook = torch.zeros(2, 64), knobs.runtime.launch_enter_hook
    launches(x, x[0])
    with patch.object(kernel, "run") as usual:
        hook.add(print)
        try:
            launches(x, x[0])
        finally:
            hook.remove(print)
        assert usual.call_count == 1
        assert launches(x, x[0]) and usual.call_count == 1
    with patch.object(JITFunction, "run") as replaced:
        assert not launches(x, x[0]) and replaced.call_count == 1
