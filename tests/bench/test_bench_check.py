"""`bench.check` shrinks a wrong kernel to its simplest case, says what is wrong where, and replays it."""

import os
import re
from pathlib import Path

import pytest
import torch
from mutants import Plant, by_rule, exchange, insert, plant  # noqa: F401 (plant: a fixture)

from bench import check
from bench.correctness import kept_coverage, repro_bundle
from bench.correctness.error_budget import argument_names, example_args
from bench.correctness.failure_report import describe_first_wrong, error_map
from bench.correctness.find_failure import find_failure
from bench.correctness.gate import gate
from bench.correctness.guarded_memory import MismatchError, tensors
from bench.correctness.tiles import TileCoverage, launch_tilings
from vila_triton.registry import OPS, Impl, IntRange, Unsupported, discover

ONE = "m=1 n=1 G=1 group=64 dtype=float32 order=sub bias=False residual=False"
CONFIGS = {"one_token_ahead": 2}  # of small tiles, which are interpreted sooner
PLANTED = {  # op, the change of its kernel, what check finds, the case it shrinks to
    "swapped_nibbles": (
        "int4_matmul",
        exchange("tl.arange(0, 8) * 4", "(tl.arange(0, 8) ^ 4) * 4"),
        "beyond budget",
        ONE,
    ),
    "no_mask_n": (
        "int4_matmul",
        exchange("N", "2**20", call="store_tile"),
        "wrote outside",
        ONE,
    ),
    "half_precision_sum": (
        "int4_matmul",
        by_rule("dtype of a sum", "tl.dot"),
        "beyond budget",
        ONE,
    ),
    "one_tile": (
        "int4_matmul",
        exchange("acc", "acc + (pid_m * pid_n == 1)", call="store_tile"),
        "beyond budget",
        ONE.replace("m=1 n=1", "m=17 n=65"),
    ),
    "one_token_ahead": (
        "prefill_attention",
        by_rule("shift a bound", "tokens[None, :] <= position"),
        "beyond budget",
        "b=1 s=1 t=1 g=1 ratio=1 d=32 l=16 dtype=float32 kv=plain numerics=fast",
    ),
    "no_more_than_six_rows": (
        "swiglu",
        insert("assert s < 7", after="s, f = "),
        "crashed",
        "s=7 f=1 dtype=float32",
    ),
}
FIRST = {"one_tile": "[16, 64]", "one_token_ahead": "[0, 0, 0]", "swapped_nibbles": "[0, 0]"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", PLANTED)
def test_wrong_kernel_is_shrunk_saved_and_replayed(name: str, plant: Plant, tmp_path: Path, capsys) -> None:  # noqa: F811
    op, edit, kind, smallest = PLANTED[name]
    config = CONFIGS.get(name, 0)
    plant(op, name, edit)
    assert check.main([op, "--impl", name, "--config", str(config), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"shrunk case  {smallest} seed=\d+\n", said), said
    assert f"what failed  {kind}" in said
    assert FIRST.get(name, "") in said[said.find("first wrong") :].partition(" is ")[0]
    assert gate(OPS[op].impls[name], OPS[op].impls[name].configs[config])  # and no tool times it
    replay = ["--replay", str(tmp_path / f"{op}-{name}-{config}.bundle")]
    assert check.main(replay) == 1
    assert f"what failed  {kind}" in capsys.readouterr().out
    plant(op, name)  # mended
    assert check.main(replay) == 0
    assert "the call matches the reference now" in capsys.readouterr().out


def test_report_describes_the_saved_call(plant: Plant, tmp_path: Path, capsys) -> None:  # noqa: F811
    plant("int4_matmul", "nibbles", PLANTED["swapped_nibbles"][1])
    check.main(["int4_matmul", "--impl", "nibbles", "--config", "1", "--out", str(tmp_path)])
    said = re.search(r"first wrong  output 0\[0, 0\] is (\S+), expected (\S+) ±", capsys.readouterr().out)
    saved = repro_bundle.load(tmp_path / "int4_matmul-nibbles-1.bundle")
    op, impl = repro_bundle.resolve(saved)
    assert said and float(said[1]) == pytest.approx(float(impl(*saved.args, config=saved.config)), rel=1e-6)
    assert float(said[2]) == pytest.approx(float(op.reference(*saved.args)), rel=1e-5)
    assert saved.config == impl.configs[1] and saved.sizes["group"] == 64 and "commit" in saved.stamp


def test_copied_kernel_file_is_checked_and_right(plant: Plant, capsys) -> None:  # noqa: F811
    plant("rms_norm", "mine")
    assert check.main(["rms_norm", "--examples", "3"]) == 0
    said = capsys.readouterr().out
    assert "interpreted" in said or os.environ.get("TRITON_INTERPRET") != "1"
    ran = [line.split(",")[0] for line in said.splitlines() if line.startswith("rms_norm")]
    every = [f"rms_norm {i.name}" for i in OPS["rms_norm"].impls.values() for _ in i.configs if i.name != "reference"]
    assert ran == every and "rms_norm mine" in ran and f"{len(ran)} right, 0 wrong" in said


@pytest.mark.parametrize(
    ("config", "sizes", "said"),
    [
        ({"BLOCK_M": 16}, [{"m": 1}, {"m": 16}], ["m: 1 tile of 16 (BLOCK_M), NEVER MORE THAN ONE"]),
        ({"BLOCK_M": 16}, [{"m": 1}, {"m": 33}], ["m: 1–3 tiles of 16 (BLOCK_M), last tile partial"]),
        ({"BLOCK_N": 32}, [{"n": 64}, {"n": 32}], ["n: 1–2 tiles of 32 (BLOCK_N), THE LAST NEVER PARTIAL"]),
        (
            {"BLOCK_K": 64},
            [{"G": 5, "group": 80}, {"G": 1, "group": 64}],
            ["k: 1–7 tiles of 64 (BLOCK_K), last tile partial"],
        ),
        (
            {"BLOCK_M": 16},
            [{"s": 9, "ratio": 4, "t": 3}],
            ["rows of queries: 3 tiles of 16 (BLOCK_M), last tile partial"],
        ),
        (
            {"BLOCK_N": 64},
            [{"s": 9, "t": 100}, {"s": 1, "t": 0}],
            [
                "keys: 0–2 tiles of 64 (BLOCK_N), last tile partial",
                "new keys: 1 tile of 64 (BLOCK_N), NEVER MORE THAN ONE",
            ],
        ),
        (
            {"BLOCK_H": 4},
            [{"g": 3, "ratio": 2}],
            [
                "KV heads: 1 tile of 4 (BLOCK_H), NEVER MORE THAN ONE",
                "heads: 2 tiles of 4 (BLOCK_H), last tile partial",
            ],
        ),
        (
            {"BLOCK_K": 64, "SPLIT_K": 4},
            [{"k": 257}],
            ["k: 5 tiles of 64 (BLOCK_K), last tile partial", "k: 2 tiles of 256 (SPLIT_K), last tile partial"],
        ),
        (
            {"ROWS": 8, "PARTS": 16},
            [{"rows": 150}],
            ["rows: 2 tiles of 128 (PARTS), last tile partial", "rows: 19 tiles of 8 (ROWS), last tile partial"],
        ),
        ({"BLOCK_X": 4}, [{"m": 3}], ["BLOCK_X: what it cuts is not known here"]),
    ],
)
def test_coverage_counts_tiles(config: dict, sizes: list[dict], said: list[str]) -> None:
    coverage = TileCoverage()
    for x in sizes:
        coverage.add(launch_tilings({**config, "num_warps": 4}, (), x))
    *lines, last = coverage.lines(config)
    assert (lines if last.startswith("edges of tiles: ") else [*lines, last]) == said


def test_coverage_counts_the_tiles_of_launches_that_replace_the_configs() -> None:
    coverage = TileCoverage()
    coverage.add(
        launch_tilings({"BLOCK_M": 64, "BLOCK_K": 32}, [{"BLOCK_M": 16}, {"BLOCK": 8}], {"m": 33, "k": 64, "n": 9})
    )
    assert list(coverage.lines({"BLOCK_M": 64})) == [
        "n: 2 tiles of 8 (BLOCK), last tile partial",
        "k: 2 tiles of 32 (BLOCK_K), THE LAST NEVER PARTIAL",
        "m: 1–3 tiles of 16 or 64 (BLOCK_M), last tile partial",
        "edges of tiles: 3 of 36",
    ]


def test_coverage_knows_the_axis_of_every_block() -> None:
    discover()
    for op in OPS.values():
        lowest = {name: axis.low if isinstance(axis, IntRange) else axis.values[0] for name, axis in op.domain.items()}
        for impl in op.impls.values():
            coverage = TileCoverage()
            coverage.add(launch_tilings(impl.configs[0], (), lowest))
            assert not [text for text in coverage.lines(impl.configs[0]) if "not known" in text], impl


def test_coverage_names_blocks_with_a_single_tile(capsys) -> None:
    assert check.main(["rms_norm", "--impl", "triton", "--config", "0", "--examples", "2"]) == 0
    said = capsys.readouterr().out
    assert (
        "right        2 examples" in said
        and "\n  covered      e: 1 tile of 1024 (BLOCK), NEVER MORE THAN ONE\n" in said
    )


def test_coverage_is_kept_between_runs_of_an_unchanged_kernel(plant: Plant, capsys) -> None:  # noqa: F811
    plant("rms_norm", "mine")
    said = []
    for _ in range(2):
        assert check.main(["rms_norm", "--impl", "mine", "--config", "1", "--examples", "4"]) == 0
        said.append(capsys.readouterr().out)
    assert "earlier run" not in said[0] and "4 examples in" in said[1] and "after 1 earlier run\n" in said[1]
    tiles = [int(re.search(r"e: 1–(\d+) tiles of 128", text)[1]) for text in said]  # pyright: ignore
    assert tiles[1] >= tiles[0] > 1
    impl = OPS["rms_norm"].impls["mine"]
    kept = kept_coverage.coverage_file(impl, impl.configs[1])
    runs, coverage = kept_coverage.load_coverage(kept)
    assert runs == 2 and any(x.tiles == 1 and x.offset == 1 for x in coverage.edges)
    impl.file.write_text(impl.file.read_text() + "# changed\n")
    assert kept_coverage.load_coverage(kept_coverage.coverage_file(impl, impl.configs[1])) == (0, TileCoverage())
    kept.write_text("{}")
    impl.file.write_text(impl.file.read_text().removesuffix("# changed\n"))
    assert check.main(["rms_norm", "--impl", "mine", "--config", "1", "--examples", "4"]) == 2
    assert f"{kept} does not hold what check covered" in capsys.readouterr().err


def test_only_triton_kernels_are_reported_as_interpreted(capsys) -> None:
    for impl, interpreted in (("aten", False), ("triton", True)):
        check.main(["swiglu", "--impl", impl, "--config", "0", "--examples", "2"])
        assert ("Triton kernels run " in capsys.readouterr().out) == interpreted


def test_read_outside_an_argument_names_it(plant: Plant) -> None:  # noqa: F811
    plant("swiglu", "beyond", by_rule("< becomes <=", "offs < F"))
    discover()
    refused = gate(OPS["swiglu"].impls["beyond"], OPS["swiglu"].impls["beyond"].configs[0])
    assert refused and "read outside argument gate, of shape [1, 1]" in refused
    args = example_args(OPS["int4_matmul"], 0, m=1, n=8, G=1, group=32, dtype="float16", order="sub", bias=True)
    names = ["x", "w.qweight", "w.scales", "w.zeros", "bias"]
    assert argument_names(OPS["int4_matmul"], args) == names


def test_implementation_that_supports_no_example_is_not_right(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(*args: object) -> None:
        raise Unsupported("needs a wand")

    monkeypatch.setitem(OPS["rope"].impls, "magic", Impl("rope", "magic", refuse, [{}], Path(__file__)))
    assert check.main(["rope", "--impl", "magic", "--examples", "5"]) == 0
    assert "unsupported  needs a wand\n0 right, 0 wrong, 1 unsupported here" in capsys.readouterr().out


def test_flaky_kernel_is_reported_with_a_caveat() -> None:
    calls = []

    def moody(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        calls.append(gate)
        return OPS["swiglu"].reference(gate, up) + (
            len(calls) in (5, 6)
        )  # of two calls in the same memory one is checked

    verdict = find_failure(OPS["swiglu"], Impl("swiglu", "moody", moody, [{}], Path(__file__)), {}, 20, 10.0)
    assert verdict.simplest and "do not fail each time" in verdict.caveat


def test_check_stops_when_the_gpu_is_lost(plant: Plant, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # noqa: F811
    plant("swiglu", "deadly", PLANTED["no_more_than_six_rows"][1])
    monkeypatch.setattr("bench.correctness.find_failure.gpu_responds", lambda: False)
    assert check.main(["swiglu", "--impl", "deadly"]) == 1
    said = capsys.readouterr().out
    assert said.count("swiglu deadly") == 1 and "the GPU with it" in said and "shrunk case" not in said


def test_failure_is_reported_when_shrinking_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.correctness.find_failure.SHRINK_SECONDS", 0.0)
    wrong = Impl("swiglu", "wrong", lambda gate, up: OPS["swiglu"].reference(gate, up) * 2, [{}], Path(__file__))
    verdict = find_failure(OPS["swiglu"], wrong, {}, 20, 0.0)
    assert verdict.simplest and "ran out of time" in verdict.caveat
    right = Impl("swiglu", "right", OPS["swiglu"].reference, [{}], Path(__file__))
    assert find_failure(OPS["swiglu"], right, {}, 20, 0.0).num_examples == 1


def test_error_map_shows_the_wrong_tile_and_first_element() -> None:
    want = torch.zeros(40, 80, dtype=torch.float64)
    got = want.float()
    got[20, 70], got[39, 3], got[17, 79] = 5e-3, float("nan"), 2.0**-15
    error = MismatchError("beyond budget", "", "output 0", got, want, torch.full_like(want, 1e-5))
    times = torch.where(got.isnan(), torch.inf, got.double().abs() / 1e-5)
    unit, rows = error_map(times, (16, 64))
    assert "2 x 1 elements" in unit and "16 x 64" in unit
    assert rows[8] == "-" * 64 + "+" + "-" * 16
    marks = {(i, j): c for i, row in enumerate(rows) for j, c in enumerate(row) if c not in ".|-+"}
    assert marks == {(9, 80): "1", (11, 71): "3", (21, 3): "#"}  # a line after each 8 rows and 64 columns
    assert (
        describe_first_wrong(error, times)
        == "output 0[17, 79] is 3.05175781e-05, expected 0 ± 1e-05 (3.05 times the budget)"
    )


class Hostile:
    """Makes a file if it is ever unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


INT4 = {"m": 2, "n": 3, "G": 2, "group": 32, "dtype": "float16", "order": "fma", "bias": True}


def test_bundle_of_an_int4_weight_is_lossless(tmp_path: Path) -> None:
    op = OPS["int4_matmul"]
    args = example_args(op, 0, **INT4)
    repro_bundle.save(tmp_path / "int4", op.impls["reference"], {}, args, 0, "aligned", INT4, "a test")
    back = repro_bundle.load(tmp_path / "int4").args
    assert (back[1].group_size, back[1].rounding) == (32, "fma")
    assert all(torch.equal(x, y) for x, y in zip(tensors(args), tensors(back), strict=True))
    assert torch.equal(op(*back), op(*args))


def test_invalid_bundle_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    args = (torch.ones(2, 4), torch.ones(4), 1e-5)
    impl = OPS["rms_norm"].impls["reference"]
    whole = tmp_path / "whole"
    repro_bundle.save(whole, impl, {}, args, 0, "strided", {}, "a test")
    assert check.main(["--replay", str(whole)]) == 0
    held = torch.load(whole, weights_only=True)

    def other(name: str, **changes: object) -> str:
        torch.save({**held, **changes}, tmp_path / name)
        return str(tmp_path / name)

    weight = repro_bundle.to_plain(example_args(OPS["int4_matmul"], 0, **INT4)[1])
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[:700])
    (tmp_path / "text").write_text("not a bundle")
    cases = {
        str(cut): "not a whole one",
        str(tmp_path / "text"): "is no bundle",
        str(tmp_path / "nowhere"): "does not exist",
        other("code", args=(Hostile(tmp_path / "made"),)): "is no bundle",
        other("format", format="other"): "does not begin with the format",
        other("seed", seed="0"): "seed missing or of the wrong type",
        other("huge", seed=2**70): "seed missing or of the wrong type",
        other("layout", layout="upside down"): "its layout is 'upside down', expected aligned or strided",
        other("op", op="sorcery"): "op 'sorcery', which does not exist; there are: ",
        other("impl", impl="mine"): "'mine', which does not exist; there are: reference",
        other("config", config={"BLOCK": 4}): "no longer takes this call",
        other("leaf", args=({"qweight": torch.ones(1)}, *args[1:])): "expected an int4 weight",
        **{
            other(f"no {leaf}", args=({k: x for k, x in weight.items() if k != leaf}, *args[1:])): "an int4 weight"
            for leaf in weight
        },
        other(
            "a group that is no number", args=({**weight, "group_size": "2"}, *args[1:])
        ): "does not take these arguments",
        other("shapes", args=(torch.ones(2, 5), *args[1:])): "does not take these arguments",
        other("values", args=("x", *args[1:])): "does not take these arguments",
        other("sparse", args=(torch.ones(2, 4).to_sparse(), *args[1:])): "expected a plain one",
    }
    capsys.readouterr()
    for file, message in cases.items():
        assert check.main(["--replay", file]) == 2, file
        said = capsys.readouterr().err
        assert message in said and file in said and said.count("\n") == 1, said
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["sorcery"], "no op 'sorcery'; there are: "),
        (["rope", "--impl", "mine"], "rope has no implementation 'mine'; there are: reference"),
        (["rope", "--impl", "triton", "--config", "99"], "no config 99: triton has"),
        ([], "expected an OP to check or a bundle"),
    ],
)
def test_bad_usage_is_refused_in_one_line(argv: list[str], message: str, capsys) -> None:
    assert check.main(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_op_with_only_a_reference_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(OPS["linear"], "impls", {"reference": OPS["linear"].impls["reference"]})
    assert check.main(["linear"]) == 2
    assert "linear has only its reference, which --impl reference checks" in capsys.readouterr().err
