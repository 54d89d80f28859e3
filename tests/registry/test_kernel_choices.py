"""Choices of implementations, one name or names by ranges of a size: in Python, in configs/kernels.toml, in tables."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_op import load

from bench import tune
from bench.tuner import cost_model, table
from vila_triton.commands.ops import print_ops
from vila_triton.paths import config_dir
from vila_triton.registry import (
    OPS,
    Op,
    count_calls,
    default_choices,
    discover,
    tuned_tables,
    use,
    validate_choices,
)
from vila_triton.registry.kernel_config import PHASES, configured_choices, read_kernels_toml
from vila_triton.registry.size_ranges import (
    BoundedChoice,
    Choice,
    ChoiceByCase,
    ChoiceBySize,
    implementation_at,
    implementation_names,
    parse_choice,
    rename_implementations,
)

discover()
GPU = "Toy GPU"
CUDA = torch.device("cuda")


@pytest.fixture
def doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Op:
    """The toy op with a second implementation."""
    op = load(tmp_path, monkeypatch)
    op.impl("whole", configs=[{"times": 2}, {"times": 3}])(lambda x, times: 2 * x)
    return op


def ran(op: Op, *sizes: int) -> list[str]:
    """Which implementation runs at each size."""
    found = []
    for m in sizes:
        with count_calls() as calls:
            op(torch.ones(m, 8))
        found += [name for _, name in calls]
    return found


RANGES = [[2, "reference"], [5, "whole"], "blocks"]


def test_a_call_runs_the_implementation_of_its_size_range(doubled: Op) -> None:
    with use(doubled=RANGES):
        assert ran(doubled, 1, 2, 3, 5, 6, 900) == ["reference"] * 2 + ["whole"] * 2 + ["blocks"] * 2
    with default_choices({"doubled": RANGES}):
        assert ran(doubled, 1, 3, 6) == ["reference", "whole", "blocks"]
        with use(doubled="whole"):
            assert ran(doubled, 1, 3, 6) == ["whole"] * 3


@given(st.sets(st.integers(0, 100), max_size=5))
def test_lookup_takes_the_first_range_that_ends_at_a_size_or_later(ends: set[int]) -> None:
    pairs = [[end, f"up to {end}"] for end in sorted(ends)]
    choice = parse_choice([*pairs, "beyond"])
    for size in range(102):
        want = next((name for end, name in pairs if size <= end), "beyond")
        assert (choice if isinstance(choice, str) else choice.lookup(size)) == want  # pyright: ignore
    assert table.choice_to_json(choice) == ([*pairs, "beyond"] if pairs else "beyond")  # pyright: ignore


CHOICES = st.lists(st.integers(0, 30), max_size=4, unique=True).flatmap(
    lambda ends: st.lists(st.sampled_from("abc"), min_size=len(ends) + 1, max_size=len(ends) + 1).map(
        lambda names: ChoiceBySize(tuple(sorted(ends)), tuple(names)) if ends else names[0]
    )
)


@given(CHOICES, CHOICES, st.integers(0, 30), st.integers(0, 30))
def test_a_bounded_choice_keeps_the_fallback_for_other_sizes(
    inside: ChoiceBySize | str, outside: ChoiceBySize | str, first: int, more: int
) -> None:
    both = BoundedChoice(first, first + more, inside).with_fallback(outside)
    for size in range(64):
        assert implementation_at(both, size) == implementation_at(
            inside if first <= size <= first + more else outside, size
        )
    if isinstance(both, ChoiceBySize):
        assert (
            all(a != b for a, b in zip(both.names, both.names[1:])) and parse_choice(table.choice_to_json(both)) == both
        )


BY_CASE = [{"n": [1, 3], "run": [[4, "whole"], "blocks"]}, {"n": 2, "run": "blocks"}, [2, "reference"], "whole"]


def test_a_choice_by_case_takes_the_first_case_that_fits_the_call() -> None:
    choice = parse_choice(BY_CASE)
    names = {n: [implementation_at(choice, size, {"n": n}) for size in (1, 4, 5)] for n in (1, 2, 3, 4)}
    assert names[1] == names[3] == ["whole", "whole", "blocks"]
    assert names[2] == ["blocks"] * 3 and names[4] == ["reference", "whole", "whole"]
    assert isinstance(choice, ChoiceByCase)
    assert choice.describe("whole", "m") == "n 1 or 3: m up to 4; otherwise m from 3"
    assert choice.describe("blocks", "m") == "n 1 or 3: m from 5; n 2: always"
    renamed = rename_implementations(choice, {"whole": "all"})
    assert implementation_names(renamed) == ("all", "blocks", "blocks", "reference", "all")
    bounded = BoundedChoice(1, 3, "tuned").with_fallback(choice)
    assert [implementation_at(bounded, size, {"n": 1}) for size in (1, 3, 4, 5)] == [
        "tuned",
        "tuned",
        "whole",
        "blocks",
    ]


@pytest.mark.parametrize(
    "value, message",
    [
        ([{"n": 1, "run": "whole"}], "at the end, expected the choice for all other calls"),
        ([{"n": 1}, "whole"], 'expected sizes and "run"'),
        ([{"run": "whole"}, "whole"], 'expected sizes and "run"'),
        ([{"size": 1, "run": "whole"}, "whole"], "no size 'size' in a case; there are: m, n, dtype"),
        ([{"n": 1, "run": "nothing"}, "whole"], "no implementation 'nothing'"),
        ([{"n": "1", "run": "whole"}, "whole"], "a case for n ['1'], expected values of IntRange("),
        ([{"n": [], "run": "whole"}, "whole"], "a case for n [], expected values of IntRange("),
        ([{"dtype": ["float32", "bf16"], "run": "whole"}, "whole"], "expected values of OneOf('float32',)"),
    ],
)
def test_a_bad_case_is_named(doubled: Op, value: list, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=re.escape(message)), use(doubled=value):
        pass


def test_describe_lists_the_ranges_of_a_name() -> None:
    choice = ChoiceBySize((4, 5, 64), ("gemv", "splitk", "gemv", "prefill"))
    words = [choice.describe(name, "m") for name in ("gemv", "splitk", "prefill")]
    assert words == ["m up to 4, m 6 to 64", "m 5", "m from 65"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("twice = 'whole'", "no op 'twice'"),
        ("doubled = 'halves'", "'doubled' has no implementation 'halves'; there are: reference, blocks, whole"),
        ("doubled = [[4, 'whole'], 'halves']", "no implementation 'halves'"),
        ("doubled = [[4, 'whole'], [4, 'blocks'], 'whole']", "end at 4, 4, expected increasing"),
        ("doubled = [[9, 'whole'], [4, 'blocks'], 'whole']", "end at 9, 4, expected increasing"),
        ("doubled = [[4, 'whole'], [9, 'blocks']]", r"\[9, 'blocks'\] is at the end, expected the name"),
        ("doubled = [['whole', 4], 'blocks']", r"\['whole', 4\] is no range, expected \[last size, \"name\"\]"),
        ("doubled = ['whole', 'blocks']", "'whole' is no range"),
        ("doubled = []", r"\[\] is at the end"),
        ("doubled = 3", "3 is at the end"),
        ("quantized = [[4, 'reference'], 'reference']", "no size that varies"),
        ("[cuda.decoding]\ndoubled = 'whole'", "cuda.decoding is no section"),
        ("doubled = ", "Invalid value"),
    ],
)
def test_errors_in_kernels_toml_name_the_file(
    doubled: Op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setitem(OPS, "quantized", Op(lambda x: x, False))
    file = tmp_path / "kernels.toml"
    file.write_text(f"[cuda]\n{line}\n")
    with pytest.raises(ValueError, match=f"kernels.toml, .*{message}"):
        read_kernels_toml(file, "cuda", "prefill")


def test_the_section_of_a_phase_overrides_that_of_its_device(doubled: Op, tmp_path: Path) -> None:
    file = tmp_path / "kernels.toml"
    file.write_text(
        "[cuda]\ndoubled = [[4, 'whole'], 'blocks']\nrope = 'reference'\n[cuda.decode]\ndoubled = 'whole'\n"
    )
    assert read_kernels_toml(file, "cuda", "prefill")["doubled"] == ChoiceBySize((4,), ("whole", "blocks"))
    assert read_kernels_toml(file, "cuda", "decode") == {"doubled": "whole", "rope": "reference"}
    assert read_kernels_toml(file, "tpu", "decode") == {}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_implementations_in_kernels_toml_exist(device: str, phase: str) -> None:
    assert configured_choices(device, phase) == read_kernels_toml(config_dir() / "kernels.toml", device, phase)
    assert "int4_matmul" in configured_choices(device, phase)


def predicted(op: str, name: str, m: int, gpu: cost_model.GpuModel, choices: Mapping[str, Choice]) -> float:
    """Seconds of the default config at sizes of Llama-3-VILA1.5-8b; "unfused" is the ops it is made of."""
    sizes: dict[str, Any] = dict(m=m, n=14336, G=32, group=128, dtype="float16", order="sub")
    if name == "unfused":
        swiglu = OPS["swiglu"].impls["triton"]
        each = predicted("int4_matmul", implementation_at(choices["int4_matmul"], m), m, gpu, choices)
        return 2 * each + (
            cost_model.predict_seconds(swiglu, swiglu.configs[0], dict(s=m, f=14336, dtype="float16"), gpu) or 0
        )
    impl = OPS[op].impls[name]
    sizes |= {"bias": False} if op == "int4_matmul" else {}
    return cost_model.predict_seconds(impl, impl.default_config(gpu.arch, m), sizes, gpu) or 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("op", "impls"),
    [("int4_matmul", ("gemv", "splitk", "prefill", "dequant")), ("int4_swiglu", ("triton", "unfused"))],
)
def test_no_other_implementation_is_predicted_to_take_half_the_time(op: str, impls: tuple[str, ...], arch: str) -> None:
    """From two rows on: at one, what counts is how loads and instructions overlap, and the model knows none of them."""
    choices = configured_choices("cuda", "prefill")
    for m in (2, 3, 4, 16, 64, 65, 256, 1024, 4096):
        times = {name: predicted(op, name, m, cost_model.gpu_of_arch(arch), choices) for name in impls}
        assert times[implementation_at(choices[op], m)] < 2 * min(times.values()), (m, times)


def entry(op: Op, impl: str, seconds: dict[tuple[int, int], float]) -> dict[str, Any]:
    """An entry of a tuned table, from the seconds at (m, n)."""
    now = {"op": op.name, "impl": impl, "device": GPU, "timer": "gpu", **tuned_tables.entry_fingerprint(op.impls[impl])}
    about = {"status": "timed", "date": "2026-01-01", "commit": "abc", "torch": "2", "reason": None}
    config = dict(op.impls[impl].configs[0])
    rows = [{**about, "sizes": {"m": m, "n": n}, "config": config, "seconds": s} for (m, n), s in seconds.items()]
    made = table.build_entry(now, rows, op.dynamic_sizes)
    assert made
    return made


# whole is quicker up to 4, blocks at 16 and 64; at 256 whole has not been timed for every n
BLOCKS = {(1, 8): 3.0, (4, 8): 3.0, (16, 8): 3.0, (64, 8): 3.0, (256, 8): 3.0, (256, 9): 3.0, (1, 9): 9.0}
WHOLE = {(1, 8): 1.0, (4, 8): 2.0, (16, 8): 4.0, (64, 8): 9.0, (256, 8): 1.0, (1, 9): 9.5}


USUAL = {"doubled": ChoiceBySize((500,), ("blocks", "reference")), "rope": "reference"}  # by configs/kernels.toml


@pytest.fixture
def served(doubled: Op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The toy op on a GPU with a table in which both implementations are tuned: the file."""
    monkeypatch.setattr(tuned_tables, "tables_dir", lambda: tmp_path / "tuned")
    monkeypatch.setattr(tuned_tables, "gpu_name", lambda device: GPU if device.type == "cuda" else None)
    for module in (tuned_tables, table):
        monkeypatch.setattr(module, "configured_choices", lambda device, phase, op_name=None: USUAL)
    caches = (
        tuned_tables.load_table,
        tuned_tables.valid_entry,
        tuned_tables.table_choice,
        tuned_tables.tuned_config_at,
    )
    for cached in caches:
        cached.cache_clear()
    table.write_table(tmp_path / "tuned", GPU, entry(doubled, "whole", WHOLE))
    yield table.write_table(tmp_path / "tuned", GPU, entry(doubled, "blocks", BLOCKS))
    for cached in caches:
        cached.cache_clear()


def test_the_tuner_writes_the_fastest_by_range_and_calls_run_it(doubled: Op, served: Path) -> None:
    assert ' "doubled": {"first": 1, "last": 256, "choice": [[8, "whole"], "blocks"]}\n' in served.read_text()
    assert tuned_tables.default_choices_for(torch.device("cpu"), "decode") == USUAL
    with default_choices(tuned_tables.default_choices_for(CUDA, "prefill")):
        assert ran(doubled, 1, 8, 9, 256) == ["whole", "whole", "blocks", "blocks"]
        with use(doubled="reference"):
            assert ran(doubled, 1) == ["reference"]
    assert list(tune.stale_entries(served.parent)) == []


def test_kernels_toml_decides_beyond_the_tuned_sizes(doubled: Op, served: Path) -> None:
    """As after a search that was ended early: of one implementation it knows two sizes, of the usual one more."""
    table.write_table(served.parent, GPU, entry(doubled, "whole", {(16, 8): 1.0, (64, 8): 1.0}))
    tuned_tables.load_table.cache_clear()
    with default_choices(tuned_tables.default_choices_for(CUDA, "decode")):
        assert ran(doubled, 1, 8, 9, 128, 129, 257) == ["blocks"] * 2 + ["whole"] * 2 + ["blocks"] * 2
        assert ran(doubled, 500, 501) == ["blocks", "reference"]
    table.write_table(served.parent, GPU, entry(doubled, "blocks", {(64, 8): 3.0}))  # the usual one knows fewer sizes
    tuned_tables.table_choice.cache_clear()
    tuned_tables.load_table.cache_clear()
    with default_choices(tuned_tables.default_choices_for(CUDA, "decode")):
        assert ran(doubled, 1, 63, 64, 65, 501) == ["blocks", "blocks", "whole", "blocks", "reference"]


def test_implementations_not_compared_with_the_default_are_not_chosen(doubled: Op, served: Path) -> None:
    entries = [entry(doubled, "whole", WHOLE), {**entry(doubled, "whole", WHOLE), "impl": "reference"}]
    assert table.choose_impls(entries) == {}


def test_the_choice_does_not_depend_on_the_order_of_entries(doubled: Op, served: Path) -> None:
    entries = [entry(doubled, "whole", WHOLE), entry(doubled, "blocks", BLOCKS)]
    entries.append({**entry(doubled, "blocks", {k: 3.0 for k in WHOLE}), "impl": "reference"})
    assert len({json.dumps(table.choose_impls(order)) for order in permutations(entries)}) == 1
    assert table.choose_impls(entries[:1]) == {}
    tie = table.choose_impls([entries[0], {**entries[0], "impl": "blocks"}])
    assert tie == {"doubled": {"first": 1, "last": 256, "choice": "blocks"}}  # by name


def test_a_choice_of_a_stale_entry_is_stale(doubled: Op, served: Path) -> None:
    source = doubled.impls["blocks"].file
    source.write_text(source.read_text() + "\n")
    with pytest.raises(
        tuned_tables.StaleTableError, match=r"doubled blocks: the tuned table toy-gpu.json is stale: kernel was"
    ):
        tuned_tables.default_choices_for(CUDA, "prefill")
    with use(doubled="whole"):  # an explicit choice needs no table
        assert tuned_tables.default_choices_for(CUDA, "prefill") == USUAL


def test_a_choice_without_entries_is_stale(served: Path) -> None:
    held = json.loads(served.read_text())
    served.write_text(json.dumps({**held, "entries": held["entries"][:1]}))
    with pytest.raises(
        tuned_tables.StaleTableError, match=r"doubled: the tuned table toy-gpu.json chooses whole, which has no entry"
    ):
        tuned_tables.default_choices_for(CUDA, "prefill")
    assert "toy-gpu.json: doubled: the tuned table toy-gpu.json chooses whole" in next(
        tune.stale_entries(served.parent)
    )


def test_a_choice_tuned_with_another_triton_is_ignored_with_a_warning(doubled: Op, served: Path) -> None:
    table.write_table(served.parent, GPU, {**entry(doubled, "whole", WHOLE), "triton": "3.0.0"})
    with pytest.warns(UserWarning, match="left aside: triton was 3.0.0"):
        assert tuned_tables.default_choices_for(CUDA, "prefill") == USUAL


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"first": 1, "last": 4, "choice": "halves"}, "no implementation 'halves'"),
        ({"first": 1, "last": 4, "choice": [[4, "whole"]]}, "is at the end"),
        ({"first": 1, "last": 4, "choice": [[4, "whole"], [1, "blocks"], "blocks"]}, "increasing"),
        ({"first": 1, "choice": "whole"}, "is no choice, expected"),
        ([[4, "whole"], "blocks"], "is no choice, expected"),
    ],
)
def test_errors_in_the_choice_of_a_table_name_the_file(served: Path, choice: Any, message: str) -> None:
    held = json.loads(served.read_text())
    served.write_text(json.dumps({**held, "choices": {"doubled": choice}}))
    with pytest.raises(ValueError, match=f"toy-gpu.json, choices: .*{message}"):
        tuned_tables.default_choices_for(CUDA, "prefill")
    assert message in next(tune.stale_entries(served.parent))


def test_ops_command_describes_size_ranges(
    doubled: Op, served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_ops(CUDA, {})
    said = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(said) if line.startswith("doubled"))
    assert [re.split("  +", line)[-2] for line in said[at : at + 3]] == [
        "prefill and decode and batch_invariant, m from 501",
        "prefill and decode, m up to 0, m 9 to 500; batch_invariant, m up to 500",
        "prefill and decode, m 1 to 8",
    ]
    because = "configs/tuned/toy-gpu.json chooses for this GPU, m 1 to 256; configs/kernels.toml beyond"
    assert said[at + 3].strip() == f"because: {because}"
    print_ops(CUDA, {"doubled": "whole"})
    assert "because: --set" in capsys.readouterr().out


def test_old_names_of_implementations_are_accepted_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_choices({"int4_swiglu": "apart"}) == {"int4_swiglu": "unfused"}
    assert capsys.readouterr().err == "implementation 'apart' is now called 'unfused'\n"
    by_size = validate_choices({"int4_matmul": [[4, "rows"], "splitk"]})["int4_matmul"]
    assert isinstance(by_size, ChoiceBySize) and by_size.names == ("rowwise", "splitk")
