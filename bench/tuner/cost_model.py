"""The predicted time of a launch, from its kernel's declared costs (`SearchSpace.launch`) and figures of the GPU.

Programs run in waves, as many at a time as shared memory and warps allow. A wave of p programs takes one latency and

    memory   the larger of its share of the bytes that any kernel must move, at the bandwidth of memory, and all its
             bytes at the rate of the L2 cache or, if less, at the rate of p * bytes_per_stage * num_stages per latency
    compute  matrix products at the rate of the tensor cores and elementwise operations at that of the other units, as
             far as there are warps: an SM reaches its rate with one warp on each of its four partitions

whichever is longer, or their sum where num_stages is 1 and nothing is loaded ahead.

A library's matrix product that follows takes a launch of its own and the longer of its FLOPs and its bytes.

To that comes what a candidate wastes, where it was emulated at small sizes (`wasted_seconds`): every sector beyond the
fewest at the rate of the L2 cache, and every wavefront of shared memory beyond one for each access at one a clock.

The model knows no registers or instruction counts, and takes L2 to be 2.5 times as fast as memory, one latency to be
0.8 us and a clock to be 1.5 GHz. It is for dropping hopeless candidates and for runs without a GPU; no tuned table that
calls look up holds its seconds.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from vila_triton.paths import config_dir
from vila_triton.registry import OPS, Impl
from vila_triton.registry.search_space import LaunchCost

from ..compiler.gpus import TARGETS
from ..emulator.counters.sums import SECTOR_BYTES

LATENCY = 8e-7  # seconds from a load to its data, memory being busy
LAUNCH_SECONDS = 3e-6  # seconds
L2_SPEEDUP = 2.5  # times the bandwidth of memory
CLOCK = 1.5e9  # a second, of every SM


@dataclass(frozen=True)
class GpuModel:
    """A GPU in figures: SMs, single elementwise operations, bytes and float16 FLOPs of tensor cores per second. `guess`
    says which GPU it is taken for if it is not known, else it is empty.
    """

    arch: str
    name: str
    sms: int
    elementwise_rate: float
    bandwidth: float
    dot_rate: float
    guess: str = ""


@lru_cache
def known_gpus() -> Mapping[str, GpuModel]:
    """Returns the GPUs of configs/bench/chips.toml."""
    sheets, own = (tomllib.loads((config_dir() / "bench" / f"{file}.toml").read_text()) for file in ("gpus", "chips"))
    tables = {key: {**sheets.get(key, {}), **values} for key, values in own.items()}
    return {
        key: GpuModel(v["arch"], v["name"], v["sms"], v["lanes"], v["bandwidth"], v["flops"])
        for key, v in tables.items()
    }


def known_archs() -> list[str]:
    """Returns the architectures of the known GPUs."""
    return list(dict.fromkeys(chip.arch for chip in known_gpus().values()))


def gpu_of_arch(arch: str) -> GpuModel:
    """Returns the GPU that stands for an architecture. Errors: ValueError for one that the cost model does not know."""
    if arch not in known_archs():
        raise ValueError(f"the cost model does not know {arch}; --arch takes {', '.join(known_archs())}")
    return next(chip for chip in known_gpus().values() if chip.arch == arch)


def arch_number(arch: str) -> int:
    """Returns 10 times the compute capability of an architecture."""
    return int(arch.removeprefix("sm_"))


def gpu_of_device(device: Any) -> GpuModel:
    """Returns the GPU with these properties (`torch.cuda.get_device_properties`): by its datasheet, or else the one
    that stands for its architecture or the nearest below, scaled to the number of SMs and to the bandwidth that the
    driver gives, if any.

    Errors: ValueError below compute capability 8.0, and for GPUs that are not NVIDIA's.
    """
    capability, sms = 10 * device.major + device.minor, device.multi_processor_count
    if torch.version.hip or capability < 80:
        raise ValueError(f"{device.name}: the cost model knows NVIDIA's GPUs from compute capability 8.0 on")
    below = gpu_of_arch(max((arch for arch in known_archs() if arch_number(arch) <= capability), key=arch_number))
    listed = [known_gpus()[word] for word in re.split("[^A-Za-z0-9]+", device.name) if word in known_gpus()]
    if listed and (listed[0].sms, arch_number(listed[0].arch)) == (sms, capability):
        return listed[0]
    share = sms / below.sms
    clock_and_bus = 2 * 1000 * device.memory_clock_rate * device.memory_bus_width / 8  # twice a tick; kHz, bits
    bandwidth = clock_and_bus or share * below.bandwidth
    guess = (
        f"{device.name} (sm_{capability}, {sms} SMs) is not in configs/bench/chips.toml: the cost model takes it for "
        f"{share:.2f} of {below.name} ({below.arch}, {below.sms} SMs) with {bandwidth / 1e9:.0f} GB/s"
    )
    return GpuModel(
        below.arch, device.name, sms, share * below.elementwise_rate, bandwidth, share * below.dot_rate, guess
    )


def predict_seconds(impl: Impl, config: Mapping[str, Any], sizes: Mapping[str, Any], gpu: GpuModel) -> float | None:
    """Returns the seconds of one launch; None if the implementation's file does not declare the costs of a launch."""
    if not impl.space or not impl.space.launch_cost:
        return None
    launch = impl.space.launch_cost(config, **sizes)
    if not launch.programs:
        return LAUNCH_SECONDS
    least_bytes = OPS[impl.op].cost(**sizes)[1]  # which no kernel can spare
    min_share = min(1.0, least_bytes / (launch.programs * launch.bytes))
    slots = gpu.sms * programs_per_sm(launch, config, gpu)
    full_waves, remainder = divmod(launch.programs, slots)
    half_precision = sizes.get("dtype", "float32") != "float32"
    waves = [(full_waves, slots), (1, remainder)]
    own = LAUNCH_SECONDS + sum(
        n * wave_seconds(p, launch, config, min_share, gpu, half_precision) for n, p in waves if p
    )
    if not launch.library_flops:
        return own
    rate = gpu.dot_rate if half_precision else 2 * gpu.elementwise_rate  # float32 is multiplied on the lanes
    return own + LAUNCH_SECONDS + max(launch.library_flops / rate, launch.library_bytes / gpu.bandwidth)


def wasted_seconds(
    impl: Impl,
    config: Mapping[str, Any],
    sizes: Mapping[str, Any],
    emulated_sizes: Mapping[str, Any],
    counts: Mapping[str, int],
    gpu: GpuModel,
) -> float:
    """Returns the seconds that a launch loses to bank conflicts and uncoalesced accesses: `counts` of a launch at
    `emulated_sizes`, as many times as a launch at `sizes` has as much to do by its declared costs.
    """
    assert impl.space and impl.space.launch_cost
    small, large = (impl.space.launch_cost(config, **x) for x in (emulated_sizes, sizes))
    times = large.programs * large.bytes / max(1, small.programs * small.bytes)
    sectors = max(0, counts["sectors"] - counts["fewest_sectors"])
    wavefronts = max(0, counts["wavefronts"] - counts["accesses"])
    busy_sms = max(1, min(gpu.sms, large.programs))
    return times * (SECTOR_BYTES * sectors / (L2_SPEEDUP * gpu.bandwidth) + wavefronts / (CLOCK * busy_sms))


def programs_per_sm(launch: LaunchCost, config: Mapping[str, Any], gpu: GpuModel) -> int:
    """Returns the programs that run on one SM at a time."""
    target = TARGETS[gpu.arch]
    shared = target.shared_per_sm // (launch.bytes_per_stage * config.get("num_stages", 1) + target.reserved_per_block)
    return max(1, min(shared, target.warps_per_sm // config.get("num_warps", 4), target.blocks_per_sm))


def wave_seconds(
    programs: int, launch: LaunchCost, config: Mapping[str, Any], min_share: float, gpu: GpuModel, half_precision: bool
) -> float:
    """Returns the seconds in which so many programs, all at once, are done."""
    stages = config.get("num_stages", 1)
    rate = min(L2_SPEEDUP * gpu.bandwidth, programs * max(launch.bytes_per_stage, 1) * stages / LATENCY)
    memory = max(programs * launch.bytes / rate, programs * launch.bytes * min_share / gpu.bandwidth)
    share = min(1.0, programs * config.get("num_warps", 4) / (4 * gpu.sms))
    dot_rate = gpu.dot_rate if half_precision else 2 * gpu.elementwise_rate  # float32 is multiplied on the lanes
    compute = programs * (launch.dot_flops / dot_rate + launch.elementwise_ops / gpu.elementwise_rate) / share
    return LATENCY + (memory + compute if stages == 1 else max(memory, compute))
