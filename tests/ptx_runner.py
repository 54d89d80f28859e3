"""Runs PTX that a test writes by hand: whole kernels on arrays, or a few instructions on each element of arrays."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.emulator.launch import run_blocks, translate_ptx
from bench.emulator.report import Launch

REGISTERS = """
    .reg .pred %p<8>;
    .reg .b16 %h<24>;
    .reg .b32 %r<320>;
    .reg .b64 %q<32>;
"""


def run_ptx(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    target: str = "sm_90a",
    checks: bool = True,
    declarations: str = "",
) -> Launch:
    """Run a kernel whose instructions are `body`. The addresses of the arrays, which it may write, are in %q0, %q1, …;
    the number of the thread in its block in %r0; 16-bit registers are %h, predicates %p, shared memory begins at 0.
    """
    parameters = ",\n    ".join(f".param .u64 kernel_param_{n}" for n in range(len(arrays) + 2))
    loads = "\n".join(f"    ld.param.u64 %q{n}, [kernel_param_{n}];" for n in range(len(arrays)))
    text = f"""
.version 8.7
.target {target}
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
{declarations}
.visible .entry kernel(
    {parameters}
)
.reqntid {threads}
{{
{REGISTERS}
{loads}
    mov.u32 %r0, %tid.x;
{body}
    ret;
}}
"""
    metadata = SimpleNamespace(shared=shared, global_scratch_size=0)
    compiled = SimpleNamespace(metadata=metadata, name="kernel")
    arguments: list[tuple[str, str, Any]] = []
    for n, array in enumerate(arrays):
        assert array.flags.c_contiguous and array.flags.writeable
        arguments.append((f"array {n}", "*i8", torch.from_numpy(array.reshape(-1).view(np.uint8))))
    return run_blocks(translate_ptx(text), compiled, target[:5], (blocks, 1, 1), arguments, checks, True, 0)


LETTER = {2: "h", 4: "r", 8: "q"}


def compute(code: str, result: Any, *inputs: np.ndarray, threads: int = 64, target: str = "sm_90a") -> np.ndarray:
    """The results of instructions for each element of the inputs, a thread each, in several blocks.

    code    PTX in which {a}, {b}, {c}, {e} stand for registers with an element of each input, {d} for the result's;
            %p1 to %p7 and %r100 to %r319 are free; a result in %p0 is stored if {d} is not there
    result  the dtype of the results
    """
    count = max(len(x) for x in inputs)
    blocks = -(-count // threads)
    padded = [np.resize(x, blocks * threads) for x in inputs]
    out = np.zeros(blocks * threads, result)
    names = {}
    lines = [f"    mov.u32 %r1, %ctaid.x;\n    mad.lo.u32 %r1, %r1, {threads}, %r0;"]
    for n, (letter, x) in enumerate(zip("abce", padded)):
        size = x.dtype.itemsize
        names[letter] = f"%{LETTER[size]}{n + 10}"
        lines.append(f"    mad.wide.u32 %q20, %r1, {size}, %q{n};\n    ld.global.b{size * 8} {names[letter]}, [%q20];")
    size = out.dtype.itemsize
    names["d"] = f"%{LETTER[size]}19"
    lines.append("    " + code.format(**names))
    if "{d}" not in code:
        lines.append(f"    selp.b{size * 8} {names['d']}, 1, 0, %p0;")
    lines.append(
        f"    mad.wide.u32 %q20, %r1, {size}, %q{len(padded)};\n    st.global.b{size * 8} [%q20], {names['d']};"
    )
    launch = run_ptx("\n".join(lines), *padded, out, threads=threads, blocks=blocks, target=target)
    assert not launch.faults, launch.faults[0]
    return out[:count]
