"""What an index argument names exists: every other value is an IndexError before any implementation runs.

Which arguments are indices is read off the examples of the ops: tensors of integers.
"""

import re
from typing import Any

import pytest
import torch
from op_arguments import flat_arguments, grouped_arguments
from torch import Tensor

from bench import check
from bench.correctness import repro_bundle
from bench.correctness.guarded_memory import bit_pattern, map_tensors, tensors
from vila_triton.registry import OPS, OneOf, Op, count_calls, discover, use

discover()


def example(op: Op) -> dict[str, Any]:
    """Arguments by name, those of a cache and of a batch by the names of their fields."""
    sizes = {n: d.values[0] if isinstance(d, OneOf) else max(d.low, min(d.high, 3)) for n, d in op.domain.items()}
    return flat_arguments(op, op.make_example(**sizes, rng=torch.Generator().manual_seed(0), device="cpu"))


INDICES = [
    (op, name)
    for op in OPS.values()
    for name, x in (example(op) if op.domain else {}).items()
    if isinstance(x, Tensor) and not x.is_floating_point()
]
EACH = pytest.mark.parametrize("op, name", INDICES, ids=[f"{op.name}-{name}" for op, name in INDICES])


def planted(op: Op, name: str, value: int) -> dict[str, Any]:
    """The example with a value at the first place of an index argument that is read."""
    args = example(op)
    args[name] = args[name].clone()
    args[name].view(-1)[-1 if name == "query_start_loc" else 0] = value
    return grouped_arguments(op, args)


def refused(op: Op, name: str, value: int) -> str | None:
    """The IndexError that every implementation gives alike, having run and written nothing; None if there is none."""
    try:
        op.check(**planted(op, name, value))
    except IndexError as error:
        said = str(error)
    else:
        return None
    for impl in op.impls:
        args = planted(op, name, value)
        before = map_tensors(torch.clone, [*args.values()])
        with use(**{op.name: impl}), count_calls() as calls, pytest.raises(IndexError, match=re.escape(said)):
            op(**args)
        assert not calls
        after = tensors([*args.values()])
        assert all(torch.equal(bit_pattern(a), bit_pattern(b)) for a, b in zip(after, tensors(before), strict=True))
    return said


@EACH
def test_out_of_range_indices_are_refused_by_every_implementation(op: Op, name: str) -> None:
    ends = torch.iinfo(example(op)[name].dtype)
    said = refused(op, name, ends.max)
    assert said and (found := re.match(rf"{op.name}: {name}(\[\d+\] is| holds) {ends.max}, expected .*?(\d+):", said))
    assert refused(op, name, int(found[2]) + 1), "the first that does not exist"
    if name != "slot_mapping":  # where what lies below 0 is not cached
        assert refused(op, name, -1) and refused(op, name, ends.min)


@EACH
def test_index_tensors_of_another_dtype_are_refused(op: Op, name: str) -> None:
    args = example(op)
    for other in {torch.int16, torch.int32, torch.int64} - {args[name].dtype}:
        args[name] = args[name].to(other)
        with pytest.raises(ValueError, match=f"{op.name}: {name} is {other}, expected torch.int"):
            op(**grouped_arguments(op, args))


def test_unused_entries_of_a_block_table_are_not_checked() -> None:
    op = OPS["decode_attention"]
    args = grouped_arguments(op, example(op))
    want, cache = op(**args), args["cache"]
    used = -(-args["seq_lens"] // cache.page_size)  # pages of each sequence
    unused = torch.arange(cache.block_table.shape[1]) >= used[:, None]
    assert unused.any()
    cache.block_table[unused] = -7
    assert torch.equal(op(**args), want)


@pytest.mark.parametrize(("b", "starts", "message"), [
    (2, [0, 4, 3], r"query_start_loc\[1\] is 4, expected 0 to 3"),
    (2, [1, 2, 3], r"query_start_loc\[0\] is 1, expected 0"),
    (2, [0, 2, 2], r"query_start_loc\[2\] is 2, expected 3"),
    (3, [0, 2, 1, 3], r"query_start_loc\[2\] is 1, expected 2 to 3"),
])  # fmt: skip
def test_query_start_loc_must_rise_from_0_to_the_number_of_tokens(b: int, starts: list[int], message: str) -> None:
    op = OPS["prefill_attention"]
    args = example(op)
    args |= {name: args[name][:1].expand(3, -1, -1) for name in "qkv"}
    args |= {"block_table": args["block_table"][:1].expand(b, -1), "context_lens": args["context_lens"][:1].expand(b)}
    args["query_start_loc"] = torch.tensor(starts).int()
    with pytest.raises(IndexError, match=message):
        op(**grouped_arguments(op, args))


def test_indices_of_a_repro_bundle_are_checked_before_it_runs(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    op, name = next((op, name) for op, name in INDICES if op.name == "kv_write")
    impl, args = op.impls["triton"], planted(op, name, 10**6)
    repro_bundle.save(tmp_path / "x.bundle", impl, impl.configs[0], tuple(args.values()), 0, "aligned", {}, "a test")
    assert check.main(["--replay", str(tmp_path / "x.bundle")]) == 2
    assert "kv_write: slot_mapping holds 1000000, expected at most" in capsys.readouterr().err


def test_indices_on_a_gpu_are_checked_only_in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    from vila_triton.ops.indices import can_read_values

    for said, wanted in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("VILA_TRITON_DEBUG", said)
        assert can_read_values(torch.device("cuda")) is wanted
        assert can_read_values(torch.device("cpu")) and not can_read_values(torch.device("meta"))
    monkeypatch.setenv("VILA_TRITON_DEBUG", "yes")
    with pytest.raises(ValueError, match="VILA_TRITON_DEBUG is 'yes', expected 1, or 0"):
        can_read_values(torch.device("cuda"))
