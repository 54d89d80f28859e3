"""The GPUs that the stand-in can be: for each architecture what `torch.cuda.get_device_properties` says of one."""

from types import SimpleNamespace

from ..compiler.gpus import TARGETS, KiB

# The name, multiprocessors, clocks in kHz (of the multiprocessors and of memory) and bits of the memory bus.
# Data sheets of the A100 SXM 80GB, the GeForce RTX 4090 and the H100 SXM.
GPUS = {
    "sm_80": ("an A100", 108, 1410000, 1593000, 5120),
    "sm_89": ("an RTX 4090", 128, 2520000, 10501000, 384),
    "sm_90": ("an H100", 132, 1980000, 2619000, 5120),
}


def properties_of(target: str, total_memory: int) -> SimpleNamespace:
    """Returns the properties of the GPU that stands for an architecture, with this much memory in bytes.

    No GPU has its name, so no table tuned on one is taken for it or written over. Its cache is far smaller than a
    GPU's: `bench.measure.timing` makes as many copies of its arguments as overflow it, and here that would take long.
    """
    (name, multiprocessors, clock, memory_clock, bus), spec = GPUS[target], TARGETS[target]
    major, minor = divmod(int(spec.triton_target.arch), 10)
    return SimpleNamespace(
        name=f"stand-in for {name}",
        major=major,
        minor=minor,
        multi_processor_count=multiprocessors,
        L2_cache_size=2**12,
        total_memory=total_memory,
        shared_memory_per_block=48 * KiB,
        shared_memory_per_block_optin=spec.max_shared_per_block,
        shared_memory_per_multiprocessor=spec.shared_per_sm,
        regs_per_multiprocessor=4 * spec.registers_per_partition,
        max_threads_per_multi_processor=32 * spec.warps_per_sm,
        max_threads_per_block=1024,
        warp_size=32,
        is_integrated=0,
        clock_rate=clock,
        memory_clock_rate=memory_clock,
        memory_bus_width=bus,
    )
