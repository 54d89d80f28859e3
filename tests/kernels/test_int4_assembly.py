"""Codes become numbers: the inline assembly of `_int4_dequant` and its twin without any, on all 65,536 half-words.

The assembly is read by the few lines below, which know the instructions it is made of; on a GPU it runs.
"""

import re
import sys
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from bench.correctness.error_budget import DEVICE, INTERPRETED, assert_matches_reference
from bench.correctness.guarded_memory import bit_pattern
from vila_triton.kernels import _int4_dequant, _launch  # pyright: ignore
from vila_triton.ops.int4_tiles import unpack_nibbles
from vila_triton.registry import OPS, discover

HALVES = torch.arange(2**16)
WORDS = (
    (HALVES | (HALVES * 40503 + 12345) % 2**16 << 16).to(torch.uint32).view(torch.int32)
)  # each half takes all values
TOP, LOW = torch.arange(16)[:, None], (torch.arange(16)[:, None] * 7 + 3) % 16  # zeros of the rows r and r + 8
ORDER, OF_LOW_ROW = [0, 4, 1, 5, 2, 6, 3, 7], torch.tensor([0, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
ASSEMBLY = {torch.float16: _int4_dequant.FLOAT16_ASM.value, torch.bfloat16: _int4_dequant.BFLOAT16_ASM.value}
DTYPES = pytest.mark.parametrize("dtype", ASSEMBLY, ids=str)
codes_minus_zero, opaque_copy = _int4_dequant.codes_minus_zero, _launch.opaque_copy
discover()


def expected(dtype: torch.dtype) -> Tensor:
    """code - zero, [8, 16 zeros, words]."""
    codes = unpack_nibbles(WORDS)[:, ORDER].t()[:, None]  # [8, 1, words]
    return (codes - torch.where(OF_LOW_ROW[:, None, None], LOW, TOP)).to(dtype)


def logic(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """lop3: bit i of the table is the result where the bits of a, b and c spell i."""
    out = torch.zeros_like(a | b | c)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & 0xFFFFFFFF


def by_halves(fn: Callable[..., Tensor], dtype: torch.dtype, *packed: Tensor) -> Tensor:
    """fn in float64 of the numbers that lie in the halves of each register, rounded to dtype."""
    out = 0
    for shift in (0, 16):
        exact = fn(*((x >> shift & 0xFFFF).to(torch.uint16).view(dtype).double() for x in packed))
        rounded = exact.to(dtype)
        assert torch.equal(rounded.double(), exact)  # nothing is rounded, so that the way it is cannot matter
        out = out | bit_pattern(rounded).long() % 2**16 << shift
    return torch.as_tensor(out)


def executed(text: str, dtype: torch.dtype, *operands: Tensor) -> Tensor:
    """The eight results of assembly for its operands $8, $9, $10, each held in int64: [8, 16 zeros, words]."""
    held: dict[str, Tensor] = {f"${8 + i}": x for i, x in enumerate(operands)}

    def value(name: str) -> Tensor:
        if name.startswith("{"):
            low, high = (value(x) for x in name.strip("{}").split(", "))
            return low | high << 16
        return torch.tensor(int(name, 0)) if name[0].isdigit() else held[name]

    for line in re.findall(r"^(\w\S*) (.+);$", text, re.M):
        opcode, names = line[0], re.findall(r"\{.*?\}|[^,\s]+", line[1])
        a, *b = (value(x) for x in names[1:])
        if opcode == "mov.b32" and names[0].startswith("{"):
            held |= dict(zip(names[0].strip("{}").split(", "), (a & 0xFFFF, a >> 16)))
        elif opcode == "mov.b32":
            held[names[0]] = a
        elif opcode == "shr.u32":
            held[names[0]] = a >> b[0]
        elif opcode == "lop3.b32":
            held[names[0]] = logic(a, b[0], b[1], int(b[2]))
        elif opcode == "sub.rn.f16x2":
            held[names[0]] = by_halves(lambda x, y: x - y, torch.float16, a, *b)
        else:
            assert opcode == {torch.float16: "fma.rn.f16x2", torch.bfloat16: "fma.rn.bf16x2"}[dtype]
            held[names[0]] = by_halves(lambda x, y, z: x * y + z, dtype, a, *b)
    results = torch.broadcast_tensors(*(held[f"${i}"] for i in range(8)))
    return torch.stack(results).to(torch.uint16).view(dtype)


def operands(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the operands that `differences` hands to the assembly: words, and numbers of the zeros of either row."""
    top, low = (1024 + TOP, -64 - LOW) if dtype == torch.float16 else (-128 - TOP, -128 - LOW)
    return WORDS.long() % 2**32, *(bit_pattern(x.to(dtype)).long() % 2**16 for x in (top, low))


class Lanes(Tensor):
    """A tensor that can be cast as Triton's are."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:  # pyright: ignore
        return self.view(dtype) if bitcast else super().to(dtype)


def in_torch(dtype: torch.dtype) -> Tensor:
    """The twin itself, run on tensors of torch."""
    names: dict[str, Any] = {"tl": SimpleNamespace(**{str(d)[6:]: d for d in (torch.int16, *ASSEMBLY)})}
    for fn in (_int4_dequant.code_to_float16, _int4_dequant.code_to_bfloat16, _int4_dequant.codes_minus_zero):
        names[fn.fn.__name__] = FunctionType(fn.fn.__code__, names)
    lanes = (x.as_subclass(Lanes) for x in (WORDS, TOP, LOW))
    return torch.stack([x.as_subclass(Tensor) for x in names["codes_minus_zero"](*lanes, dtype, False)])


@triton.jit
def _differences_kernel(
    words_ptr, zeros_ptr, low_zeros_ptr, out_ptr, COUNT, DTYPE: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1) + tl.zeros([BLOCK], tl.int32)
    words, zero, low_zero = tl.load(words_ptr + offs), tl.load(zeros_ptr + row), tl.load(low_zeros_ptr + row)
    parts = codes_minus_zero(words, zero, low_zero, DTYPE, ASM)
    for i in tl.static_range(8):
        tl.store(out_ptr + (i * 16 + row) * COUNT + offs, parts[i])


def launched(dtype: torch.dtype, asm: bool) -> Tensor:
    """`differences` as a kernel of its own: [8, 16 zeros, words]."""
    out = torch.empty(8, 16, len(WORDS), dtype=dtype, device=DEVICE)
    operands = (x.to(DEVICE) for x in (WORDS, TOP.half(), LOW.half()))
    kind = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    block = 1024 if DEVICE == "cuda" else len(WORDS)  # interpreted, few programs are quicker
    grid: Any = (len(WORDS) // block, 16)
    _differences_kernel[grid](*operands, out, len(WORDS), DTYPE=kind, ASM=asm, BLOCK=block)  # pyright: ignore
    return out.cpu()


@pytest.fixture
def assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter executes inline assembly: a move, in registers of as many bits as constraints say, or codes."""
    if not _launch.INTERPRETED:
        pytest.skip("kernels are compiled here, and assembly runs")

    def result(data: Tensor, dtype: tl.dtype, like: Any) -> Any:
        return tl.core.tensor(TensorHandle(data.numpy(), dtype), tl.block_type(dtype, like.shape))

    def elementwise(asm: Any, constraints: Any, args: list, dtype: Any, **_: Any) -> Any:
        values = [torch.from_numpy(x.handle.data) for x in args]
        if move := re.fullmatch(r"mov\.b(16|32) \$0, \$1;", text := str(getattr(asm, "value", asm))):
            width = {"=h,h": 16, "=r,r": 32}[constraints]
            assert int(move[1]) == width
            wide = values[0].element_size() == 4
            kept = values[0].view(torch.int32 if wide else torch.int16).long() & (1 << width) - 1
            return result(kept.to(torch.int32 if wide else torch.int16).view(values[0].dtype), dtype, args[0])
        words, top, low = torch.broadcast_tensors(*values)
        operands = (words.long() % 2**32, *(bit_pattern(x.contiguous()).long() % 2**16 for x in (top, low)))
        return tuple(result(x, tl.float16, args[0]) for x in executed(text, torch.float16, *operands))

    monkeypatch.setattr(tl, "inline_asm_elementwise", elementwise)


@triton.jit
def _opaque_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, opaque_copy(tl.load(x_ptr + offs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
def test_opaque_copy_keeps_all_bits(dtype: torch.dtype, assembly: None) -> None:
    x = torch.randn(64).mul(1000).to(dtype)
    out = torch.zeros_like(x)
    _opaque_kernel[1,](x, out, BLOCK=64)  # pyright: ignore
    assert torch.equal(bit_pattern(out), bit_pattern(x))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "name", ["int4_matmul-gemv", "int4_matmul-splitk", "int4_matmul-prefill", "int4_swiglu-triton"]
)
def test_kernels_with_inline_assembly_match_the_reference(
    name: str, dtype: str, assembly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for sm_80 and sm_89, whose compiler may not see how tiles are put together."""
    op_name, impl_name = name.split("-")
    op, impl = OPS[op_name], OPS[op_name].impls[impl_name]
    monkeypatch.setattr(sys.modules[impl.fn.__module__], "target_flags", lambda: {"ASM": True, "OPAQUE": True})
    bias = {"bias": True} if op_name == "int4_matmul" else {}
    sizes = {"m": 2, "n": 16, "G": 2, "group": 64, "dtype": dtype, "order": "sub", **bias}
    args = op.make_example(**sizes, rng=torch.Generator().manual_seed(0), device="cpu")
    assert_matches_reference(op, impl, impl.configs[0], args)


@DTYPES
def test_assembly_and_triton_dequantize_every_half_word_alike(dtype: torch.dtype) -> None:
    found = executed(ASSEMBLY[dtype], dtype, *operands(dtype))
    assert torch.equal(bit_pattern(found), bit_pattern(in_torch(dtype)))
    assert torch.equal(bit_pattern(found), bit_pattern(expected(dtype)))


def test_triton_dequantization_in_a_launched_kernel_is_bit_equal() -> None:
    assert torch.equal(bit_pattern(launched(torch.float16, asm=False)), bit_pattern(expected(torch.float16)))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="assembly is compiled, not interpreted")
@DTYPES
def test_assembly_and_triton_are_bit_equal_on_a_gpu(dtype: torch.dtype) -> None:
    assert torch.equal(bit_pattern(launched(dtype, asm=True)), bit_pattern(expected(dtype)))
    assert torch.equal(bit_pattern(launched(dtype, asm=False)), bit_pattern(expected(dtype)))


@pytest.mark.parametrize(
    ("dtype", "old", "new"),
    [
        (torch.float16, "lop3.b32 b, $8, 0x00f000f0", "lop3.b32 b, $8, 0x007000f0"),
        (torch.float16, "shr.u32 h, $8, 8", "shr.u32 h, $8, 7"),
        (torch.float16, "sub.rn.f16x2 c, c, t", "sub.rn.f16x2 c, a, t"),
        (torch.float16, "mov.b32 {$4, $5}, c", "mov.b32 {$5, $4}, c"),
        (torch.bfloat16, "shr.u32 j, $8, 12", "shr.u32 j, $8, 8"),
        (torch.bfloat16, "fma.rn.bf16x2 d, d, o, l", "fma.rn.bf16x2 d, d, o, t"),
    ],
)
def test_assembly_with_one_instruction_changed_gives_other_bits(dtype: torch.dtype, old: str, new: str) -> None:
    assert ASSEMBLY[dtype].count(old) == 1
    found = executed(ASSEMBLY[dtype].replace(old, new), dtype, *operands(dtype))
    assert not torch.equal(bit_pattern(found), bit_pattern(expected(dtype)))
