"""What a compiled kernel takes of a GPU: registers, spills, shared memory."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs


@dataclass(frozen=True)
class Resources:
    """`registers` of a thread; `spills`: bytes of memory a thread keeps others in; bytes of shared memory."""

    name: str
    registers: int
    spills: int
    shared: int


def kernel_resources(kernel: Any) -> Resources:
    """What a compiled kernel takes."""
    registers, spills = (amd_resources if "amdgcn" in kernel.asm else nvidia_resources)(kernel)
    return Resources(kernel.name, registers, spills, kernel.metadata.shared)


def nvidia_resources(kernel: Any) -> tuple[int, int]:
    """(registers a thread, bytes a thread spills): what `cuobjdump` of the Triton wheel says of the cubin."""
    text = run_on_cubin(knobs.nvidia.cuobjdump.path, "-res-usage", cubin=kernel.asm["cubin"])
    registers, stack, local = (int(re.findall(rf"\b{word}:(\d+)", text)[-1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def run_on_cubin(*command: str, cubin: bytes) -> str:
    """What a tool of the Triton wheel prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def amd_resources(kernel: Any) -> tuple[int, int]:
    """(vector registers a thread, bytes of scratch memory): the metadata at the end of the assembly.

    Scalar registers that are spilled lie in lanes of vector registers; what of them does not fit there is in scratch.
    """
    metadata = {word: int(n) for word, n in re.findall(r"\.(\w+):\s+(\d+)$", kernel.asm["amdgcn"], re.MULTILINE)}
    return metadata["vgpr_count"], metadata["private_segment_fixed_size"]
