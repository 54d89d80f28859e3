"""An emulator of the inline assembly of our kernels, which Triton's interpreter cannot run: with the operands that a
kernel passes, in the registers that its constraints name.

It knows the instructions that are used. A register is an int64 tensor of unsigned values.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import TensorHandle

from bench.correctness.guarded_memory import bit_pattern

BITS = {"h": 16, "r": 32}  # of the registers of a constraint
PACKED_DTYPES = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


def lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """Bit i of the table is the result where the bits of a, b and c spell i."""
    out = torch.zeros_like(a | b | c)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & 0xFFFFFFFF


def multiply_add(dtype: torch.dtype, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c of the two numbers in each register. Nothing may be rounded, so that the way it is cannot matter."""
    out = torch.zeros((), dtype=torch.int64)
    for shift in (0, 16):
        x, y, z = ((r >> shift & 0xFFFF).to(torch.uint16).view(dtype).double() for r in (a, b, c))
        rounded = (x * y + z).to(dtype)
        assert torch.equal(rounded.double(), x * y + z)
        out = out | bit_pattern(rounded).long() % 2**16 << shift
    return out


def execute(text: str, constraints: str, operands: Sequence[Tensor]) -> list[Tensor]:
    """The registers that assembly leaves its results in, of the shape that the operands broadcast to."""
    letters = constraints.split(",")
    bits = {f"${i}": BITS[letter.removeprefix("=")] for i, letter in enumerate(letters)}
    results = [name for name, letter in zip(bits, letters) if letter.startswith("=")]
    registers = dict(zip([name for name in bits if name not in results], operands, strict=True))

    def value(name: str) -> Tensor:
        if name.startswith("{"):
            low, high = (value(half) for half in name.strip("{}").split(", "))
            return low | high << 16
        return torch.tensor(int(name, 0)) if name[0].isdigit() else registers[name]

    for opcode, rest in re.findall(r"^(\w\S*) (.+);$", text, re.M):
        name, *sources = re.findall(r"\{.*?\}|[^,\s]+", rest)
        a, *more = (value(source) for source in sources)
        operation, _, kind = opcode.rpartition(".")
        if operation == "mov" and name.startswith("{"):
            registers |= dict(zip(name.strip("{}").split(", "), (a & 0xFFFF, a >> 16)))
        elif operation == "mov":
            assert {bits.get(x, int(kind[1:])) for x in (name, *sources) if x[0] == "$"} <= {int(kind[1:])}
            registers[name] = a
        elif operation == "shr":
            registers[name] = a >> more[0]
        elif operation == "lop3":
            registers[name] = lop3(a, more[0], more[1], int(more[2]))
        elif operation == "sub.rn":
            one = bit_pattern(torch.ones((), dtype=PACKED_DTYPES[kind])).long() * 0x10001
            registers[name] = multiply_add(PACKED_DTYPES[kind], a, one, more[0] ^ 0x80008000)
        else:
            assert operation == "fma.rn", f"no emulation of {opcode}"
            registers[name] = multiply_add(PACKED_DTYPES[kind], a, *more)
    shape = torch.broadcast_shapes(*(x.shape for x in operands))
    assert all(bool((registers[name] >> bits[name] == 0).all()) for name in results)
    return [registers[name].expand(shape) for name in results]


def to_register(x: Tensor) -> Tensor:
    """The bits of numbers of 16 or 32 bits as unsigned values."""
    return bit_pattern(x.contiguous()).long() % 2 ** (8 * x.element_size())


def from_register(register: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a dtype of 16 or 32 bits that have these bits."""
    return register.to(torch.uint16 if dtype.itemsize == 2 else torch.uint32).view(dtype)


def run_assembly(text: str, constraints: str, args: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """`tl.inline_asm_elementwise` on tensors of torch. Operands and results must be as wide as their registers."""
    letters = [letter.removeprefix("=") for letter in constraints.split(",")]
    assert [BITS[letter] for letter in letters] == [8 * dtype.itemsize for dtype in (*dtypes, *(x.dtype for x in args))]
    registers = execute(text, constraints, [to_register(x) for x in args])
    return [from_register(register, dtype) for register, dtype in zip(registers, dtypes, strict=True)]


def emulated_inline_asm(
    asm: Any, constraints: Any, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int, **_: Any
) -> Any:
    """`tl.inline_asm_elementwise` of the interpreter. Errors: AssertionError for what the emulator does not know."""
    assert pack == 1
    text, letters = (str(getattr(x, "value", x)) for x in (asm, constraints))
    dtypes = dtype if isinstance(dtype, tuple | tl.tuple) else (dtype,)
    values = [torch.from_numpy(x.handle.data) for x in args]
    torch_dtypes = [getattr(torch, {"fp16": "float16", "fp32": "float32"}.get(str(x), str(x))) for x in dtypes]
    with _disable_current_modes():  # what the emulator allocates is not what `guarded_allocations` watches
        numbers = [x.contiguous().numpy() for x in run_assembly(text, letters, values, torch_dtypes)]
    results = [
        tl.core.tensor(TensorHandle(x, kind), tl.block_type(kind, list(x.shape))) for x, kind in zip(numbers, dtypes)
    ]
    return tuple(results) if isinstance(dtype, tuple | tl.tuple) else results[0]
