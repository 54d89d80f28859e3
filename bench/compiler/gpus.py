"""The GPUs that kernels are compiled for, and the number of blocks that one multiprocessor runs at once."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KiB = 1024


@dataclass(frozen=True)
class GpuSpec:
    """The limits of one architecture. A multiprocessor (SM, CU) has four partitions, each with its own registers.

    Sources: for NVIDIA the CUDA C++ programming guide, technical specifications per compute capability; for AMD the
    CDNA3 instruction set architecture and the limits of LLVM's AMDGPU back end for gfx942.
    """

    triton_target: GPUTarget
    max_shared_per_block: int  # bytes of shared memory, the most a block may use
    shared_per_sm: int  # bytes in a multiprocessor
    reserved_per_block: int  # bytes the system takes of every block's
    warps_per_sm: int  # the most a multiprocessor holds
    blocks_per_sm: int
    registers_per_partition: int  # 32 bits each
    register_unit: int  # a warp's registers are rounded up to a multiple of it
    max_registers_per_thread: int  # a thread may use


def nvidia_spec(capability: int, block_shared: int, shared: int, warps: int, blocks: int) -> GpuSpec:
    """Returns the limits of an NVIDIA architecture; shared memory in KiB."""
    gpu = GPUTarget("cuda", capability, 32)
    return GpuSpec(gpu, block_shared * KiB, shared * KiB, KiB, warps, blocks, 16 * KiB, 256, 255)


TARGETS = {
    "sm_80": nvidia_spec(80, 163, 164, 64, 32),
    "sm_86": nvidia_spec(86, 99, 100, 48, 16),
    "sm_87": nvidia_spec(87, 163, 164, 48, 16),
    "sm_89": nvidia_spec(89, 99, 100, 48, 24),
    "sm_90": nvidia_spec(90, 227, 228, 64, 32),
    "sm_100": nvidia_spec(100, 227, 228, 64, 32),
    "sm_120": nvidia_spec(120, 99, 100, 48, 24),
    "gfx942": GpuSpec(GPUTarget("hip", "gfx942", 64), 64 * KiB, 64 * KiB, 0, 32, 16, 32 * KiB, 512, 512),
}
DEFAULT_TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")  # what checks compile for where nobody says


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that a multiprocessor runs at once, the share of the warps that it could run, and what limits
    them.
    """

    blocks: int
    warps: int
    share: float
    limit: str


def occupancy(target: GpuSpec, registers: int, shared: int, warps: int) -> Occupancy:
    """Returns the occupancy of a kernel with so many registers per thread, bytes of shared memory per block and warps
    per block.
    """
    unit = target.register_unit
    registers_per_warp = -(-max(registers, 1) * target.triton_target.warp_size // unit) * unit
    shared_per_block = shared + target.reserved_per_block
    limits = {
        "registers": 4 * (target.registers_per_partition // registers_per_warp) // warps,
        "blocks": target.blocks_per_sm,
        "warps": target.warps_per_sm // warps,
        "shared memory": target.shared_per_sm // shared_per_block if shared_per_block else target.blocks_per_sm,
    }
    limit = min(limits, key=lambda name: limits[name])
    blocks = limits[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / target.warps_per_sm, limit)
