"""The GPUs kernels are compiled for, and how many blocks of a kernel one multiprocessor of theirs holds at once."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KiB = 1024


@dataclass(frozen=True)
class Target:
    """One architecture. A multiprocessor is four partitions, each with registers of its own.

    NVIDIA: CUDA C++ programming guide, technical specifications per compute capability. AMD: CDNA3 instruction set
    architecture, and the limits of LLVM's AMDGPU back end for gfx942.
    """

    gpu: GPUTarget
    block_shared: int  # bytes of shared memory, the most a block may use
    shared: int  # bytes in a multiprocessor
    reserved: int  # bytes the system takes of every block's
    warps: int  # the most a multiprocessor holds
    blocks: int
    partition_registers: int  # 32 bits each
    register_unit: int  # a warp's registers are rounded up to a multiple of it
    most_registers: int  # a thread may use


def nvidia(capability: int, block_shared: int, shared: int, warps: int, blocks: int) -> Target:
    gpu = GPUTarget("cuda", capability, 32)
    return Target(gpu, block_shared * KiB, shared * KiB, KiB, warps, blocks, 16 * KiB, 256, 255)


TARGETS = {
    "sm_80": nvidia(80, 163, 164, 64, 32),
    "sm_86": nvidia(86, 99, 100, 48, 16),
    "sm_87": nvidia(87, 163, 164, 48, 16),
    "sm_89": nvidia(89, 99, 100, 48, 24),
    "sm_90": nvidia(90, 227, 228, 64, 32),
    "sm_100": nvidia(100, 227, 228, 64, 32),
    "sm_120": nvidia(120, 99, 100, 48, 24),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KiB, 64 * KiB, 0, 32, 16, 32 * KiB, 512, 512),
}
CHECKED = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")  # what checks compile for where nobody says


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps a multiprocessor holds at once, the share of the warps it could hold, and what stops more."""

    blocks: int
    warps: int
    share: float
    limit: str


def occupancy(target: Target, registers: int, shared: int, warps: int) -> Occupancy:
    """For a kernel of so many registers a thread, bytes of shared memory a block and warps a block."""
    unit = target.register_unit
    of_a_warp = -(-max(registers, 1) * target.gpu.warp_size // unit) * unit
    taken = shared + target.reserved
    room = {
        "registers": 4 * (target.partition_registers // of_a_warp) // warps,
        "blocks": target.blocks,
        "warps": target.warps // warps,
        "shared memory": target.shared // taken if taken else target.blocks,
    }
    limit = min(room, key=lambda name: room[name])
    blocks = room[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / target.warps, limit)
