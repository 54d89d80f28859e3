"""Bitwise-exact ops give the same bits on a GPU, where torch divides by scalars differently and compilers fuse."""

import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import Edit, exchange
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.compiled import check_compiled
from bench.compiler.cross_compile import CompileRequest, run_in_subprocesses
from bench.correctness.error_budget import assert_matches_reference, example_args
from vila_triton import ops
from vila_triton.ops.kv_pages import KV_BITS, QuantizedKVPages, quantize_kv
from vila_triton.registry import OPS, REFERENCE, Impl, Op, discover

discover()
ROOT = Path(__file__).resolve().parents[2]
EXACT = [op for op in OPS.values() if op.bitwise_exact]
CASES = [
    pytest.param(op, impl, config, id=f"{op.name}-{impl.name}-{i}")
    for op in EXACT
    for impl in op.impls.values()
    if impl.name != REFERENCE
    for i, config in enumerate(impl.configs)
]


class DividesLikeCuda(TorchDispatchMode):
    """On a GPU torch divides by a Python number, or by a tensor [] of the CPU, by a product with the reciprocal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor, torch.ops.aten.div.Scalar):
            x, by = args[0], args[1]
            number = not isinstance(by, Tensor) or (by.dim() == 0 and by.device.type == "cpu")
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and number:
                wide = torch.float64 if x.dtype == torch.float64 else torch.float32
                out = (x.to(wide) * (1 / torch.tensor(float(by), dtype=wide))).to(x.dtype)
                return x.copy_(out) if func is torch.ops.aten.div_.Tensor else out
        return func(*args, **(kwargs or {}))


def test_the_stand_in_divides_like_cuda() -> None:
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    for number, share in ((127, 0.045), (15, 0.63)):
        with DividesLikeCuda():
            by_number, by_cpu, by_tensor = x / number, x / torch.tensor(float(number)), x / torch.full_like(x, number)
        assert torch.equal(by_number, by_cpu) and torch.equal(by_tensor, x / number)
        assert (by_number != x / number).float().mean().item() == pytest.approx(share, rel=0.2)


@pytest.mark.parametrize("scales", [torch.float32, torch.float16])
@pytest.mark.parametrize("kv", KV_BITS)
def test_quantized_pages_hold_the_same_bits_on_every_device(kv: str, scales: torch.dtype) -> None:
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    like = ops.empty_kv_pages((0, 32), kv, scale_dtype=scales)
    here = quantize_kv(x, like)
    with DividesLikeCuda():
        there = quantize_kv(x, like)
    assert isinstance(here, QuantizedKVPages) and isinstance(there, QuantizedKVPages)
    for one, other in zip(ops.page_tensors(here), ops.page_tensors(there), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kv", KV_BITS)
@pytest.mark.parametrize("op, impl, config", CASES)
def test_kernels_equal_the_reference_with_cuda_division(op: Op, impl: Impl, config: dict, kv: str) -> None:
    sizes = dict(s=20, g=3, d=64, l=16, dtype="float16", kv=kv) | ({"ratio": 2} if "ratio" in op.domain else {})
    with DividesLikeCuda():
        assert_matches_reference(op, impl, config, example_args(op, 0, **sizes))


CALLS = [
    CompileRequest(op.name, "triton", 0, target, dict(s=64, g=8, d=128, l=16, dtype="bfloat16", kv=kv) | more)
    for (op, more), kv, target in product(
        [(ops.kv_write, {}), (ops.rope_kv_write, {"ratio": 4})], ["plain", *KV_BITS], ["sm_80", "sm_100"]
    )
]


def test_bitwise_exact_kernels_use_exact_instructions() -> None:
    assert {call.op for call in CALLS} == {op.name for op in EXACT}
    for call, rows in zip(CALLS, run_in_subprocesses(check_compiled, CALLS, 1)):
        assert rows and not [row["wrong"] for row in rows if row["wrong"]], (call, rows)


@pytest.mark.parametrize(
    "file, edit, instruction",
    [
        ("_kv_store.py", exchange("tl.div_rn(x, tl.broadcast_to(step, x.shape))", "(x / step)"), "div.full.f32"),
        ("kv_write.py", exchange("False", "True", keyword="enable_fp_fusion"), "mul.f32"),
    ],
)
def test_approximate_instructions_are_detected(file: str, edit: Edit, instruction: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    planted = tmp_path / "kernels" / file
    planted.write_text(edit(planted.read_text()))
    call = next(call for call in CALLS if call.sizes["kv"] == "int8")
    ((row,),) = run_in_subprocesses(check_compiled, [call], 1, str(tmp_path / "kernels"))
    assert instruction in " ".join(row["wrong"])
