"""Registers, spills and shared memory of a compiled kernel."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs


@dataclass(frozen=True)
class Resources:
    """Registers per thread, bytes that a thread spills to memory, and bytes of shared memory per block."""

    name: str
    registers: int
    spills: int
    shared: int


def kernel_resources(kernel: Any) -> Resources:
    """Returns the resources of a kernel as Triton's compiler leaves it."""
    registers, spills = (amd_resources if "amdgcn" in kernel.asm else nvidia_resources)(kernel)
    return Resources(kernel.name, registers, spills, kernel.metadata.shared)


def nvidia_resources(kernel: Any) -> tuple[int, int]:
    """Returns (registers, spilled bytes) per thread, from `cuobjdump` of the Triton wheel."""
    text = run_on_cubin(knobs.nvidia.cuobjdump.path, "-res-usage", cubin=kernel.asm["cubin"])
    registers, stack, local = (int(re.findall(rf"\b{word}:(\d+)", text)[-1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def run_on_cubin(*command: str, cubin: bytes) -> str:
    """Returns what a tool of the Triton wheel prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def amd_resources(kernel: Any) -> tuple[int, int]:
    """Returns (vector registers, bytes of scratch memory) per thread, from the metadata at the end of the assembly.

    Spilled scalar registers lie in lanes of vector registers; those that do not fit there are in scratch memory.
    """
    metadata = {word: int(n) for word, n in re.findall(r"\.(\w+):\s+(\d+)$", kernel.asm["amdgcn"], re.MULTILINE)}
    return metadata["vgpr_count"], metadata["private_segment_fixed_size"]
