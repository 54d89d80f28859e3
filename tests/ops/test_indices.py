"""What an index argument names exists: every other value is an IndexError before any implementation runs.

Which arguments are indices is read off the examples of the ops: tensors of integers.
"""

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import check
from bench.correctness import repro_bundle
from bench.correctness.guarded_memory import bit_pattern, map_tensors, tensors
from vila_triton.registry import OPS, OneOf, Op, count_calls, discover, use

discover()


def example(op: Op) -> list[Any]:
    sizes = {n: d.values[0] if isinstance(d, OneOf) else max(d.low, min(d.high, 3)) for n, d in op.domain.items()}
    return list(op.make_example(**sizes, rng=torch.Generator().manual_seed(0), device="cpu"))


NAMES = {op.name: list(inspect.signature(op.reference).parameters) for op in OPS.values()}
INDICES = [
    (op, i)
    for op in OPS.values()
    for i, x in enumerate(example(op) if op.domain else ())
    if isinstance(x, Tensor) and not x.is_floating_point()
]
EACH = pytest.mark.parametrize("op, i", INDICES, ids=[f"{op.name}-{NAMES[op.name][i]}" for op, i in INDICES])


def planted(op: Op, i: int, value: int) -> list[Any]:
    """The example with a value at the first place of an index argument that is read."""
    args = example(op)
    args[i] = args[i].clone()
    args[i].view(-1)[-1 if NAMES[op.name][i] == "query_start" else 0] = value
    return args


def refused(op: Op, i: int, value: int) -> str | None:
    """The IndexError that every implementation gives alike, having run and written nothing; None if there is none."""
    try:
        op.check(*planted(op, i, value))
    except IndexError as error:
        said = str(error)
    else:
        return None
    for impl in op.impls:
        args = planted(op, i, value)
        before = map_tensors(torch.clone, args)
        with use(**{op.name: impl}), count_calls() as calls, pytest.raises(IndexError, match=re.escape(said)):
            op(*args)
        assert not calls
        assert all(
            torch.equal(bit_pattern(a), bit_pattern(b)) for a, b in zip(tensors(args), tensors(before), strict=True)
        )
    return said


@EACH
def test_an_index_beyond_what_exists_is_refused_by_every_implementation(op: Op, i: int) -> None:
    name, ends = NAMES[op.name][i], torch.iinfo(example(op)[i].dtype)
    said = refused(op, i, ends.max)
    assert said and (found := re.match(rf"{op.name}: {name}(\[\d+\] is| holds) {ends.max}, expected .*?(\d+):", said))
    assert refused(op, i, int(found[2]) + 1), "the first that does not exist"
    if name != "slot_mapping":  # where what lies below 0 is not cached
        assert refused(op, i, -1) and refused(op, i, ends.min)


@EACH
def test_indices_have_one_dtype(op: Op, i: int) -> None:
    args = example(op)
    for other in {torch.int16, torch.int32, torch.int64} - {args[i].dtype}:
        args[i] = args[i].to(other)
        with pytest.raises(ValueError, match=f"{op.name}: {NAMES[op.name][i]} is {other}, expected torch.int"):
            op(*args)


def test_entries_of_a_block_table_that_nothing_is_cached_by_may_be_anything() -> None:
    op = OPS["decode_attention"]
    args = example(op)
    want = op(*args)
    used = -(-args[4] // args[1].shape[1])  # pages of each sequence
    unused = torch.arange(args[3].shape[1]) >= used[:, None]
    assert unused.any()
    args[3][unused] = -7
    assert torch.equal(op(*args), want)


@pytest.mark.parametrize(("b", "starts", "message"), [
    (2, [0, 4, 3], r"query_start\[1\] is 4, expected 0 to 3"),
    (2, [1, 2, 3], r"query_start\[0\] is 1, expected 0"),
    (2, [0, 2, 2], r"query_start\[2\] is 2, expected 3"),
    (3, [0, 2, 1, 3], r"query_start\[2\] is 1, expected 2 to 3"),
])  # fmt: skip
def test_new_tokens_lie_end_to_end(b: int, starts: list[int], message: str) -> None:
    op = OPS["prefill_attention"]
    q, k, v, k_pages, v_pages, table, _, history, scale = example(op)
    rows = (x[:1].expand(3, -1, -1) for x in (q, k, v))
    past = (table[:1].expand(b, -1), torch.tensor(starts).int(), history[:1].expand(b))
    with pytest.raises(IndexError, match=message):
        op(*rows, k_pages, v_pages, *past, scale)


def test_a_bundle_is_looked_at_before_it_is_run(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    op, i = next((op, i) for op, i in INDICES if op.name == "kv_write")
    impl, args = op.impls["triton"], planted(op, i, 10**6)
    repro_bundle.save(tmp_path / "x.bundle", impl, impl.configs[0], tuple(args), 0, "aligned", {}, "a test")
    assert check.main(["--replay", str(tmp_path / "x.bundle")]) == 2
    assert "kv_write: slot_mapping holds 1000000, expected at most" in capsys.readouterr().err


def test_on_a_gpu_values_are_looked_at_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from vila_triton.ops.indices import can_read_values

    for said, wanted in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("VILA_TRITON_DEBUG", said)
        assert can_read_values(torch.device("cuda")) is wanted
        assert can_read_values(torch.device("cpu")) and not can_read_values(torch.device("meta"))
    monkeypatch.setenv("VILA_TRITON_DEBUG", "yes")
    with pytest.raises(ValueError, match="VILA_TRITON_DEBUG is 'yes', expected 1, or 0"):
        can_read_values(torch.device("cuda"))
