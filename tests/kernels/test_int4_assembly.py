"""Codes become numbers: the inline assembly of `_int4_dequant` and its twin without any, on all 65,536 half-words, and
in whole kernels. The assembly is emulated on the operands that kernels pass; on a GPU it runs.
"""

import sys
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import triton
import triton.language as tl
from inline_assembly import emulated_inline_asm, run_assembly
from torch import Tensor

from bench.correctness.error_budget import DEVICE, INTERPRETED, assert_matches_reference, example_args
from bench.correctness.guarded_memory import MismatchError, bit_pattern
from vila_triton.kernels import _int4_dequant, _launch  # pyright: ignore
from vila_triton.ops.int4_tiles import unpack_nibbles
from vila_triton.registry import OPS, Impl, Op, discover

HALVES = torch.arange(2**16)
WORDS = (
    (HALVES | (HALVES * 40503 + 12345) % 2**16 << 16).to(torch.uint32).view(torch.int32)
)  # each half takes all values
TOP, LOW = torch.arange(16)[:, None], (torch.arange(16)[:, None] * 7 + 3) % 16  # zeros of the rows r and r + 8
ORDER, OF_LOW_ROW = [0, 4, 1, 5, 2, 6, 3, 7], torch.tensor([0, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
codes_minus_zero, opaque_copy = _int4_dequant.codes_minus_zero, _launch.opaque_copy
discover()


def expected(dtype: torch.dtype) -> Tensor:
    """code - zero, [8, 16 zeros, words]."""
    codes = unpack_nibbles(WORDS)[:, ORDER].t()[:, None]  # [8, 1, words]
    return (codes - torch.where(OF_LOW_ROW[:, None, None], LOW, TOP)).to(dtype)


class Lanes(Tensor):
    """A tensor that can be cast as Triton's are."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:  # pyright: ignore
        return self.view(dtype) if bitcast else super().to(dtype)


def in_torch(dtype: torch.dtype, asm: bool, run: Callable[..., Any] = run_assembly) -> Tensor:
    """`codes_minus_zero` itself, run on tensors of torch, and its assembly by `run`: [8, 16 zeros, words]."""

    def elementwise(text: str, constraints: str, args: list, dtypes: tuple, is_pure: bool, pack: int) -> list[Tensor]:
        assert is_pure and pack == 1
        return run(text, constraints, [x.as_subclass(Tensor) for x in args], dtypes)

    dtypes = {str(d)[6:]: d for d in (torch.int16, *HALF_DTYPES)}
    names: dict[str, Any] = {"tl": SimpleNamespace(inline_asm_elementwise=elementwise, **dtypes)}
    names |= {name: getattr(_int4_dequant, name).value for name in ("FLOAT16_ASM", "BFLOAT16_ASM", "ASM_CONSTRAINTS")}
    for fn in (_int4_dequant.code_to_float16, _int4_dequant.code_to_bfloat16, _int4_dequant.codes_minus_zero):
        names[fn.fn.__name__] = FunctionType(fn.fn.__code__, names)
    lanes = (x.as_subclass(Lanes) for x in (WORDS, TOP, LOW))
    return torch.stack([x.as_subclass(Tensor) for x in names["codes_minus_zero"](*lanes, dtype, asm)])


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
    """The interpreter executes inline assembly."""
    if not _launch.INTERPRETED:
        pytest.skip("kernels are compiled here, and assembly runs")
    monkeypatch.setattr(tl, "inline_asm_elementwise", emulated_inline_asm)


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


KERNELS = pytest.mark.parametrize(
    "op, impl",
    [
        pytest.param(op, impl, id=f"{op.name}-{impl.name}")
        for op in OPS.values()
        for impl in op.impls.values()
        if hasattr(sys.modules[impl.fn.__module__], "target_flags")
    ],
)


def example(op: Op, dtype: str, order: str) -> tuple:
    """Arguments of two groups and of a last tile with top rows only."""
    bias = {"bias": True} if "bias" in op.domain else {}
    return example_args(op, 0, **{"m": 2, "n": 20, "G": 2, "group": 64, "dtype": dtype, "order": order, **bias})


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched as for sm_80 and sm_89, whose compiler may not see how tiles are put together."""
    for case in KERNELS.args[1]:
        module = sys.modules[case.values[1].fn.__module__]
        monkeypatch.setattr(module, "target_flags", lambda *_: {"ASM": True, "OPAQUE": True})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@KERNELS
def test_kernels_with_inline_assembly_match_the_reference(
    op: Op, impl: Impl, dtype: str, assembly: None, flags: None
) -> None:
    for i in range(max(2, len(impl.configs))):
        config = impl.configs[i % len(impl.configs)]
        assert_matches_reference(op, impl, config, example(op, dtype, ("sub", "fma")[i % 2]))


def test_operands_that_sm_100_may_not_see_through_are_copied(assembly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of products in float32 that were loaded in fewer bits, see `ieee_operand`."""
    copy = Mock(side_effect=emulated_inline_asm)
    monkeypatch.setattr(tl, "inline_asm_elementwise", copy)
    monkeypatch.setattr(_launch, "COMPILED", True)
    monkeypatch.setattr(_launch, "cuda_capability_geq", lambda major: major <= 10)
    sizes = {"b": 1, "t": 20, "g": 1, "ratio": 2, "d": 32, "l": 16, "kv": "int8", "numerics": "fast"}
    quantized_kv = example_args(OPS["decode_attention"], 0, dtype="float32", **sizes)
    for op, name, args in (
        (OPS["int4_matmul"], "splitk", example(OPS["int4_matmul"], "float32", "sub")),
        (OPS["decode_attention"], "triton", quantized_kv),
    ):
        assert_matches_reference(op, op.impls[name], op.impls[name].configs[0], args)
        assert copy.call_args.args[0] == "mov.b32 $0, $1;"
        copy.reset_mock()


@pytest.mark.parametrize("order", ["sub", "fma"])
@KERNELS
def test_exchanged_operands_are_detected(
    op: Op, impl: Impl, order: str, assembly: None, flags: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zeros of the top and of the low rows, each as the other operand would have to be."""

    def exchanged(asm: Any, constraints: Any, args: list, *more: Any, **kwargs: Any) -> Any:
        if len(args) == 3:
            words, zero, negative_low_zero = args
            args = [words, 960 - negative_low_zero, 960 - zero]  # 1024 + low_zero, -64 - zero
        return emulated_inline_asm(asm, constraints, args, *more, **kwargs)

    monkeypatch.setattr(tl, "inline_asm_elementwise", exchanged)
    with pytest.raises(MismatchError, match="elements are off"):
        assert_matches_reference(op, impl, impl.configs[0], example(op, "float16", order))


@DTYPES
@pytest.mark.parametrize("asm", [False, True], ids=["triton", "assembly"])
def test_every_half_word_is_dequantized_exactly(dtype: torch.dtype, asm: bool) -> None:
    assert torch.equal(bit_pattern(in_torch(dtype, asm)), bit_pattern(expected(dtype)))


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
    def changed(text: str, *more: Any) -> list[Tensor]:
        assert text.count(old) == 1
        return run_assembly(text.replace(old, new), *more)

    assert not torch.equal(bit_pattern(in_torch(dtype, True, changed)), bit_pattern(expected(dtype)))


@DTYPES
@pytest.mark.parametrize("order", [(0, 2, 1), (0, 1, 1), (0, 2, 2)])
def test_operands_in_another_order_give_other_bits(dtype: torch.dtype, order: tuple[int, ...]) -> None:
    def reordered(text: str, constraints: str, args: list[Tensor], dtypes: tuple) -> list[Tensor]:
        return run_assembly(text, constraints, [args[i] for i in order], dtypes)

    assert not torch.equal(bit_pattern(in_torch(dtype, True, reordered)), bit_pattern(expected(dtype)))


@pytest.mark.parametrize(
    ("constraints", "args", "dtypes"),
    [
        ("=r,r", [torch.ones(2, dtype=torch.float16)], [torch.float16]),
        ("=h,h", [torch.ones(2)], [torch.float32]),
        ("=h,r", [torch.ones(2)], [torch.float16]),
        ("=r,r", [torch.ones(2)] * 2, [torch.float32]),
    ],
)
def test_the_emulator_refuses_registers_of_another_width(constraints: str, args: list, dtypes: list) -> None:
    with pytest.raises((AssertionError, ValueError)):
        run_assembly("mov.b32 $0, $1;", constraints, args, dtypes)
