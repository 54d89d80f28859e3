"""The examples of `bench.compiled_check`, and the rows that it goes on with."""

from itertools import product
from pathlib import Path

import pytest
import torch

from bench import compiled_check
from bench.correctness.compiled_cell import Cell
from bench.correctness.compiled_plan import UNIT, choice_axes, draw_sizes, examples, variations
from bench.correctness.error_budget import example_args
from bench.correctness.guarded_memory import MEMORY_LAYOUTS, tensors
from bench.correctness.perturbation import perturbed_args, quantized_scales
from bench.measure import rows
from vila_triton.registry import OPS, IntRange, discover
from vila_triton.registry.interpreter import uses_triton_kernels

discover()
IMPLS = [impl for op in OPS.values() for impl in op.impls.values() if uses_triton_kernels(impl)]


@pytest.mark.parametrize("impl", IMPLS, ids=[f"{impl.op}-{impl.name}" for impl in IMPLS])
def test_examples_cover_dtypes_and_layouts_pairwise(impl) -> None:
    op = OPS[impl.op]
    for number, config in enumerate(impl.configs):
        planned = list(examples(op, config, number))
        wanted = set(product(choice_axes(op)["dtype"], MEMORY_LAYOUTS))
        assert {(row["dtype"], row["layout"]) for row, _ in planned} == wanted and len(planned) >= 6
        for seed, (row, sizes) in enumerate(planned):
            drawn = draw_sizes(op, config, row, sizes, seed)
            assert drawn == draw_sizes(op, config, row, sizes, seed)
            assert all(drawn[name] >= axis.low for name, axis in op.domain.items() if isinstance(axis, IntRange))


def test_sizes_fill_the_pipeline_of_every_loop() -> None:
    op, config = OPS["linear"], {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_stages": 4, "num_warps": 4}
    row = {name: values[0] for name, values in choice_axes(op).items()}
    whole, ragged = (draw_sizes(op, config, row, sizes, 0) for sizes in ("whole", "ragged"))
    assert whole["k"] >= 32 * 5 and ragged["k"] > 32 * 4 and ragged["k"] % UNIT
    assert whole["m"] > 64 and whole["n"] > 64 and not any(whole[name] % UNIT for name in "mnk")


def test_variations_are_compiled_alike() -> None:
    op, config = OPS["linear"], {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_stages": 4, "num_warps": 4}
    row = {name: values[0] for name, values in choice_axes(op).items()}
    for sizes in ("whole", "ragged"):
        first = draw_sizes(op, config, row, sizes, 0)
        changed = [other for _, other in variations(op, config, first)]
        assert len(changed) > 6
        for other in changed:
            assert all((other[x] % UNIT == 0, other[x] == 1) == (first[x] % UNIT == 0, first[x] == 1) for x in "mnk")


def test_rows_of_other_sources_are_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("swiglu", "triton", 0, "sm_80")
    row = {"kind": "compiled_check", **vars(cell), "key": cell.key()}
    rows.write(tmp_path / "journal.jsonl", [{**row, "key": "of an older kernel"}, row])
    assert compiled_check.read_journal(tmp_path / "journal.jsonl") == {cell: row}
    assert cell.key() != Cell("swiglu", "triton", 1, "sm_80").key() != Cell("swiglu", "triton", 1, "sm_90").key()


def test_budget_moves_scales_of_pages_by_a_rounding_of_the_queries() -> None:
    """References round to that what they dequantize."""
    sizes = {"b": 1, "t": 5, "g": 1, "ratio": 1, "d": 16, "l": 16, "numerics": "fast"}
    args = example_args(OPS["decode_attention"], 0, **sizes, dtype="bfloat16", kv="int8")
    scales = list(quantized_scales(args))
    assert len(scales) == 2
    moved = next(perturbed_args(args, torch.Generator().manual_seed(0), in_float64=True))
    for before, after in zip(scales, quantized_scales(moved), strict=True):
        ratio = (after / before).nan_to_num(1.0)
        assert ((ratio - 1).abs() > 2**-10).any() and ((ratio - 1).abs() < 2**-7).all()
    assert len(tensors(moved)) == len(tensors(args))


def test_targets_that_cannot_be_emulated_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        compiled_check.main(["rms_norm", "--targets", "sm_70"])
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err
