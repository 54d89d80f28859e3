"""Every Triton implementation as compiled for a GPU, in bfloat16, which no interpreter computes: against float64 within
the error budget, with nothing that the emulator faults. `python -m bench.compiled_check` has every config, dtype and
layout.
"""

import pytest
import triton

from bench.correctness.compiled_plan import choice_axes, draw_sizes
from bench.correctness.error_budget import Example, shared_example
from bench.correctness.example_plan import planned_example
from bench.correctness.guarded_memory import MemoryLayout
from bench.emulator import emulating
from vila_triton.registry import OPS, Impl, Unsupported, discover
from vila_triton.registry.interpreter import uses_triton_kernels

discover()
TARGETS = ("sm_80", "sm_90")
FENCES = not triton.__version__.startswith("3.6.")  # between cp.async and wgmma, since triton-lang/triton#9610
IMPLS = [impl for op in OPS.values() for impl in op.impls.values() if uses_triton_kernels(impl)]
ASSEMBLY = [impl for impl in IMPLS if impl.op.startswith("int4") or impl.op.endswith("attention")]
CASES = [(impl, TARGETS[i % 2], "aligned" if i // 2 % 2 else "strided") for i, impl in enumerate(IMPLS)]


def example_of(impl: Impl, seed: int, **choices: object) -> Example:
    """A small call of whole tiles with the first choices of its op, or these."""
    op = OPS[impl.op]
    row = {name: values[0] for name, values in choice_axes(op).items()}
    row |= {name: value for name, value in choices.items() if name in row}
    return planned_example(op, draw_sizes(op, impl.configs[0], row, "ragged", seed))


def assert_no_fault_but_fences(example: Example, impl: Impl, target: str, layout: MemoryLayout) -> None:
    """The call is right, and the emulator faults nothing of it but the fences that this Triton leaves out."""
    known = {"no proxy fence"} if target == "sm_90" and not FENCES else set()
    with emulating(target, raise_faults=not known) as report:
        example.check(impl, impl.configs[0], layout)
    assert report.launches and {fault.kind for fault in report.faults} <= known


@pytest.mark.parametrize(
    "impl, target, layout", CASES, ids=[f"{impl.op}-{impl.name}-{target}" for impl, target, _ in CASES]
)
def test_every_kernel_in_bfloat16(impl: Impl, target: str, layout: MemoryLayout) -> None:
    example = example_of(impl, 0, dtype="bfloat16")
    assert_no_fault_but_fences(example, impl, target, layout)


@pytest.mark.parametrize(
    "op, name", [("int4_matmul", "prefill"), ("int4_swiglu", "triton"), ("int4_matmul_backward", "triton")]
)
def test_products_in_groups_of_32_have_read_their_weights_before_others_are_written(op: str, name: str) -> None:
    impl = OPS[op].impls[name]
    sizes = {"m": 32, "n": 128, "G": 8, "group": 32, "dtype": "float16", "order": "sub"}
    terms = {name: False for name in ("bias", "residual") if name in OPS[op].domain}
    assert_no_fault_but_fences(shared_example(OPS[op], 0, **sizes, **terms), impl, "sm_90", "aligned")


def test_lanes_that_hold_the_same_sum_hold_the_same_bits() -> None:
    """Of rows whose elements of a column lie in lanes of one warp, as they do at odd strides."""
    impl = OPS["rms_norm_backward"].impls["triton"]
    example = shared_example(OPS["rms_norm_backward"], 8, rows=11, e=513, dtype="bfloat16", values="constant_rows")
    assert_no_fault_but_fences(example, impl, "sm_80", "strided")


@pytest.mark.parametrize("impl", ASSEMBLY, ids=[f"{impl.op}-{impl.name}" for impl in ASSEMBLY])
def test_kernels_with_inline_assembly(impl: Impl) -> None:
    """Those of int4 weights and pages, which interpreted are other code."""
    texts: list[str] = []
    try:
        with emulating("sm_80", edit=lambda ptx: texts.append(ptx) or ptx):
            example_of(impl, 1, dtype="float16", kv="int4").check(impl, impl.configs[0], "aligned")
    except Unsupported as reason:
        assert "pages" in str(reason)  # of kernels that read none of int4
    else:
        assert any("begin inline asm" in text for text in texts)
