"""Every NVIDIA GPU from compute capability 8.0 on can be tuned for: as its datasheet says, or by its nearest kin."""

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import tune
from bench.compiled import check_compiled
from bench.compiler.cross_compile import CompileRequest, run_in_subprocesses
from bench.compiler.gpus import DEFAULT_TARGETS, TARGETS
from bench.measure.cases import cases
from bench.tuner import cost_model
from vila_triton.registry import OPS, discover

discover()
RMS_NORM = OPS["rms_norm"].impls["triton"]


def device(name: str, major: int, minor: int, sms: int) -> Any:
    about = dict(name=name, major=major, minor=minor, multi_processor_count=sms)
    return SimpleNamespace(**about, memory_clock_rate=0, memory_bus_width=0)


@pytest.mark.parametrize(
    ("name", "capability", "sms", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, "A100"),
        ("NVIDIA GeForce RTX 3090", (8, 6), 82, "3090"),
        ("NVIDIA L4", (8, 9), 58, "L4"),
        ("NVIDIA L40S", (8, 9), 142, "L40S"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "H100"),
        ("NVIDIA H200", (9, 0), 132, "H200"),
        ("NVIDIA B200", (10, 0), 148, "B200"),
        ("NVIDIA GeForce RTX 5090", (12, 0), 170, "5090"),
    ],
)
def test_known_gpus_have_the_figures_of_their_datasheets(
    name: str, capability: tuple[int, int], sms: int, key: str
) -> None:
    found = cost_model.gpu_of_device(device(name, *capability, sms))
    assert found == cost_model.known_gpus()[key] and not found.guess


@pytest.mark.parametrize(
    ("name", "capability", "sms", "kin"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 76, "4090"),
        ("NVIDIA H100 PCIe", (9, 0), 114, "H100"),
        ("NVIDIA GeForce RTX 3060", (8, 6), 28, "3090"),
        ("NVIDIA B300", (10, 3), 160, "B200"),
        ("NVIDIA Thor", (11, 0), 20, "B200"),
        ("NVIDIA GB10", (12, 1), 48, "5090"),
        ("NVIDIA of tomorrow", (20, 0), 300, "5090"),
    ],
)
def test_unknown_gpus_are_scaled_from_the_nearest_known_one(
    name: str, capability: tuple[int, int], sms: int, kin: str
) -> None:
    found, like = cost_model.gpu_of_device(device(name, *capability, sms)), cost_model.known_gpus()[kin]
    assert (found.arch, found.name, found.sms) == (like.arch, name, sms)
    rates = [
        (found.elementwise_rate, like.elementwise_rate),
        (found.bandwidth, like.bandwidth),
        (found.dot_rate, like.dot_rate),
    ]
    assert all(mine / theirs == pytest.approx(sms / like.sms) for mine, theirs in rates)
    assert found.guess.startswith(f"{name} (sm_{capability[0]}{capability[1]}, {sms} SMs) is not in configs/bench")
    assert f"for {sms / like.sms:.2f} of {like.name} ({like.arch}" in found.guess


def test_bandwidth_of_the_driver_is_used() -> None:
    pcie = device("NVIDIA H100 PCIe", 9, 0, 114)
    pcie.memory_clock_rate, pcie.memory_bus_width = 1_593_000, 5120  # kHz, bits: 2.04 TB/s by its datasheet
    assert cost_model.gpu_of_device(pcie).bandwidth == pytest.approx(2.04e12, rel=0.001)
    assert cost_model.gpu_of_device(pcie).guess.endswith("132 SMs) with 2039 GB/s")


def test_cost_model_refuses_gpus_that_cannot_run_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Tesla T4: the cost model knows NVIDIA's GPUs from compute capability 8\.0"):
        cost_model.gpu_of_device(device("Tesla T4", 7, 5, 40))
    with pytest.raises(ValueError, match="the cost model does not know sm_99; --arch takes sm_80, sm_86, "):
        cost_model.gpu_of_arch("sm_99")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="MI300X: the cost model knows NVIDIA's"):
        cost_model.gpu_of_device(device("AMD Instinct MI300X", 9, 4, 304))


@pytest.mark.parametrize("arch", cost_model.known_archs())
def test_every_architecture_has_a_target_and_predictions(arch: str) -> None:
    assert arch in TARGETS and cost_model.gpu_of_arch(arch).arch == arch
    for case in cases("rms_norm"):
        assert (
            cost_model.predict_seconds(RMS_NORM, RMS_NORM.configs[0], case.sizes, cost_model.gpu_of_arch(arch)) or 0
        ) > 0


def test_kernels_compile_for_targets_not_checked_by_default() -> None:
    sizes = dict(rows=32, e=288, dtype="float16")
    calls = [
        CompileRequest("rms_norm", "triton", 0, target, sizes) for target in TARGETS if target not in DEFAULT_TARGETS
    ]
    assert calls and [[row["wrong"] for row in rows] for rows in run_in_subprocesses(check_compiled, calls, 1)] == [
        [[]]
    ] * len(calls)


def test_search_plan_exists_for_an_unknown_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device("NVIDIA GB10", 12, 1, 48))
    monkeypatch.setattr(tune.rows, "stamp", lambda _: {"device": "NVIDIA GB10"})
    args = argparse.Namespace(timer=None, arch=None, worse_than=3.0, budget=0.05)
    plan = tune.plan_search(RMS_NORM, args)
    assert (plan.timer, plan.device, plan.gpu.arch) == ("gpu", "NVIDIA GB10", "sm_120") and plan.gpu.guess
    args.arch = "sm_90"
    assert tune.plan_search(RMS_NORM, args).gpu == cost_model.known_gpus()["H100"]
