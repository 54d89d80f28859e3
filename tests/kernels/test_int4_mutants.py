"""The tests of int4 kernels go red: each finds a bug planted in a copy of the kernels."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import test_int4_metamorphic as laws
import test_int4_regressions as issues
from mutants import Edit, by_rule, exchange, plant, renamed  # noqa: F401 (plant: a fixture)

from vila_triton import kernels
from vila_triton.ops import int4_matmul, int4_swiglu
from vila_triton.registry import Impl, Op

SHARED = ("_int4_decode", "_int4_dequant", "_int4_gemm", "_int4_launch", "_splitk_reduce")


def with_bug(folder: Path, op: Op, name: str, file: str, edit: Edit) -> Impl:
    """A copy of an implementation, and of the files it shares, with one of them edited."""
    here = op.impls[name].file.parent
    for stem in (*SHARED, f"{op.name}_{name}" if name != "triton" else op.name):
        text = (here / f"{stem}.py").read_text()
        if stem == file:
            text = edit(text)
        if stem not in SHARED:
            text = renamed(text, name, "mutant")
        for shared in SHARED:
            text = text.replace(f"from .{shared} ", f"from ._mutant{shared} ")
        (folder / (f"_mutant{stem}.py" if stem in SHARED else "mutant.py")).write_text(text)
    importlib.invalidate_caches()
    importlib.import_module(f"{kernels.__name__}.mutant")
    return op.impls["mutant"]


BUGS: dict[str, tuple[Op, str, str, Edit, Callable[[Op, Impl], None]]] = {
    "two nibbles change places": (
        int4_matmul,
        "splitk",
        "_int4_dequant",
        by_rule("swap operands", "tl.join(a, b)", function="lanes_to_tile"),
        lambda op, impl: laws.test_every_weight_is_rounded_as_int4_rounding_says(
            op, impl, impl.configs[0], "float16", "sub", 2, 64
        ),
    ),
    "rounded in the other order": (
        int4_matmul,
        "gemv",
        "_int4_dequant",
        exchange("zeros * scales", "zeros.to(tl.float32) * scales.to(tl.float32)", function="apply_scale"),
        lambda op, impl: laws.test_every_weight_is_rounded_as_int4_rounding_says(
            op, impl, impl.configs[0], "float16", "fma", 2, 64
        ),
    ),
    "groups of 32 shifted by a word": (
        int4_matmul,
        "gemv",
        "_int4_dequant",
        exchange("word // 2", "(word + 1) // 2", function="group_ids"),
        lambda op, impl: issues.test_block_k_longer_than_a_group(op, impl, impl.configs[0], 5, 32),
    ),
    "a block of k spans groups": (
        int4_matmul,
        "splitk",
        "_int4_launch",
        exchange("max(64, min(requested, group_size & -group_size))", "128", function="fit_block_k"),
        lambda op, impl: issues.test_block_k_longer_than_a_group(op, impl, impl.configs[0], 3, 64),
    ),
    "the mask of x forgotten": (
        int4_matmul,
        "prefill",
        "_int4_gemm",
        by_rule("drop a mask", "tl.load", function="load_x"),
        lambda op, impl: issues.test_weights_of_partial_tiles_are_not_read_beyond(op, impl, impl.configs[0]),
    ),
    "the mask of rows of w forgotten": (
        int4_matmul,
        "gemv",
        "_splitk_reduce",
        by_rule("drop a mask", "(offs_n < N)", function="store_result"),
        lambda op, impl: issues.test_weights_of_partial_tiles_are_not_read_beyond(op, impl, impl.configs[0]),
    ),
    "parts in half precision": (
        int4_matmul,
        "splitk",
        "_splitk_reduce",
        by_rule("dtype of a sum", "torch.float32", function="partial_sums"),
        lambda op, impl: issues.test_splitk_partial_sums_are_float32(impl.name),
    ),
    "sums in half precision before their scale": (
        int4_swiglu,
        "triton",
        "_int4_gemm",
        by_rule("dtype of a sum", "tl.dot", statement="return acc + tl.dot"),
        lambda op, impl: issues.test_sums_beyond_float16_with_results_within(op, impl, impl.configs[0]),
    ),
    "splits by the number of rows": (
        int4_matmul,
        "splitk",
        "int4_matmul_splitk",
        exchange("SPLIT_K", "2 if len(rows) < 4 else SPLIT_K", call="split_k"),
        lambda op, impl: laws.test_rows_of_x_are_bitwise_independent_of_each_other(
            op, impl, impl.configs[0], "float32", "sub"
        ),
    ),
    "a part too many is added": (
        int4_matmul,
        "splitk",
        "_splitk_reduce",
        exchange("SPLITS", "SPLITS + 1", call="tl.static_range"),
        lambda op, impl: laws.test_two_runs_are_bitwise_equal(op, impl, impl.configs[0], "float32", "sub"),
    ),
}


@pytest.mark.usefixtures("plant")  # forgets what is planted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a kernel that reads past a row computes with garbage
@pytest.mark.parametrize("bug", BUGS)
def test_mutant_fails_its_test(bug: str, tmp_path: Path) -> None:
    op, name, file, edit, test = BUGS[bug]
    test(op, op.impls[name])
    impl = with_bug(tmp_path, op, name, file, edit)
    with pytest.raises(AssertionError):
        test(op, impl)
