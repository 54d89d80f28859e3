"""`bench.mutants`: what each rule makes of a line, an even draw, and a run that finds, survives, hangs and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.measure.rows import ROOT
from bench.mutants import draw, line_map, processes
from bench.mutants.__main__ import source_files
from bench.mutants.find_mutant import modules_that_import
from bench.mutants.kernel_rules import KERNEL_RULES
from bench.mutants.left_out import reason_to_leave_out
from bench.mutants.line_map import LineMap, format_lines, parse_lines
from bench.mutants.model_rules import MODEL_RULES
from bench.mutants.processes import Failed, run_processes
from bench.mutants.source import Source
from bench.mutants.table import report_lines

KERNELS = source_files([])
IN_KERNEL = "@triton.jit\ndef _kernel(p, N, stride_m, stride_k, BLOCK: tl.constexpr):\n    acc = tl.zeros(n)\n    {}\n"
MADE = [  # rule, line, what becomes of it
    ("drop a mask", "tl.load(p, mask=m, other=0)", ["tl.load(p)"]),
    (
        "drop a mask",
        "tl.store(p, x, mask=a & b)",
        ["tl.store(p, x)", "tl.store(p, x, mask=a)", "tl.store(p, x, mask=b)"],
    ),
    ("drop a mask", "load_heads(p, row_mask)", ["load_heads(p, None)"]),
    ("shift a bound", "x = i < N", ["x = i < N - 1"]),
    (
        "shift a bound",
        "for i in range(0, N, B): pass",
        ["range(0, N - B, B)", "range(0 + B, N, B)", "range(0, N - 1, B)"],
    ),
    ("drop a bound", "x = tl.minimum(a, b)", ["x = a", "x = b"]),
    ("< becomes <=", "x = i < N", ["x = i <= N"]),
    ("swap operands", "x = a - b * c", ["x = (b * c) - a"]),
    ("swap operands", "x = a // (b + c)", ["x = (b + c) // a"]),
    ("swap operands", "x = tl.where(m, a, b)", ["x = tl.where(m, b, a)"]),
    ("drop a cast to int64", "x = (a + b).to(tl.int64)", ["x = (a + b)"]),
    ("drop a cast to int64", "x = tl.cast(n, tl.int64)", ["x = n"]),
    ("drop a cast to int64", "x = tl.full([1], B, tl.int64)", ["x = tl.full([1], B, tl.int32)"]),
    ("drop a rescale", "x = a * rescale", ["x = a"]),
    ("drop a rescale", "x = tl.fma(a, b, c)", ["x = (a + c)"]),
    ("change a stride", "x = p + m * stride_m", ["x = p + m * stride_k"]),
    ("change a stride", "x = strides[2]", ["x = strides[3]"]),
    ("first tile only", "for i in range(a, N, B): pass", ["range(a, tl.minimum(N, a + B), B)"]),
    ("first tile only", "x = tl.program_id(0) // n", ["x = (tl.program_id(0) // n * 0)"]),
    ("first tile only", "_kernel[(a, b)](p)", ["_kernel[(1, b)](p)", "_kernel[(a, 1)](p)"]),
    ("change a constant", "x = a + 64", ["x = a + 63"]),
    ("order of rounding", "x = (q - z) * scale", ["x = (q * scale - z * scale)"]),
    ("dtype of a sum", "acc += x", ["acc = (acc + x).to(tl.float16)"]),
    ("dtype of a sum", "x = a.to(tl.float32)", ["x = a.to(tl.float16)"]),
    ("dtype of a sum", "x = torch.empty(3, dtype=torch.float32)", ["x = torch.empty(3, dtype=torch.float16)"]),
    ("another comparison", "x = a == b", ["x = a != b"]),
    ("negate a condition", "if f(a): pass", ["if not f(a): pass"]),
    ("and becomes or", "x = a and b", ["x = (a or b)", "x = (b)", "x = (a)"]),
    ("off by one", "x = a[i:j]", ["x = a[i + 1:j]", "x = a[i:j + 1]"]),
    ("drop an offset", "x = a + b", ["x = a", "x = a - b"]),
    ("swap arguments", "x = f(a, b)", ["x = f(b, a)"]),
    ("drop a statement", "a.append(b)", ["pass"]),
    ("the opposite function", "x = max(a, b)", ["x = min(a, b)"]),
    ("the opposite function", "n += 1", ["n -= 1"]),
]


@pytest.mark.parametrize("rule, line, expected", MADE, ids=lambda x: str(x) if isinstance(x, str) else "")
def test_rule_makes_these_mutants_of_a_line(rule: str, line: str, expected: list[str]) -> None:
    text = IN_KERNEL.format(f"{line}  # a comment · kept")
    source = Source(text, "kernels/toy.py")
    made = [mutant.apply(text) for _, mutant in source.mutants({rule: (KERNEL_RULES | MODEL_RULES)[rule]})]
    assert [x for x in made if not any(want in x for want in expected)] == [] and len(made) == len(expected), made
    assert all(any(want in x for x in made) and "# a comment · kept" in "".join(made) for want in expected)


def test_every_rule_is_tried_on_a_line() -> None:
    assert {rule for rule, *_ in MADE} == KERNEL_RULES.keys() | MODEL_RULES.keys()


def test_mutants_of_every_file_are_python_with_ids_of_their_own() -> None:
    every = [mutant for file in KERNELS for mutant in draw.mutants_of(file)]
    assert len({mutant.id for mutant in every}) == len(every) > 1000
    assert {mutant.rule for mutant in every} == KERNEL_RULES.keys()
    for mutant in every[::7]:
        text = (ROOT / mutant.file).read_text()
        compile(mutant.apply(text), mutant.file, "exec")


def test_mutant_of_another_text_is_refused() -> None:
    mutant = next(x for x in draw.mutants_of("kernels/swiglu.py") if x.rule == "drop a rescale")
    with pytest.raises(ValueError, match=r"kernels/swiglu.py:\d+ is no longer 'gate / "):
        mutant.apply("# another line\n" + (ROOT / mutant.file).read_text())


def test_ids_stay_when_other_lines_change() -> None:
    text = IN_KERNEL.format("x = i < N")
    before, after = (
        [mutant.id for _, mutant in Source(x, "kernels/toy.py").mutants(KERNEL_RULES)]
        for x in (text, f"import math\n\n{text}    y = 3\n")
    )
    assert set(before) < set(after)


def test_draw_is_spread_over_files_and_rules_and_grows() -> None:
    drawn = draw.draw(KERNELS, 150, 17)
    assert len({mutant.id for mutant in drawn}) == 150 and drawn[:60] == draw.draw(KERNELS, 60, 17)
    assert drawn != draw.draw(KERNELS, 150, 18)
    files, rules = (Counter(getattr(mutant, name) for mutant in drawn) for name in ("file", "rule"))
    without_arithmetic = {f"kernels/{x}_aten.py" for x in ("swiglu", "swiglu_backward", "encoder_attention_backward")}
    assert set(KERNELS) - files.keys() == without_arithmetic and max(files.values()) <= 6
    assert rules.keys() == KERNEL_RULES.keys()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("BLOCK = 3 - 1", "module level"),
        ("def launch_cost(n):\n    return n - 1", "cost models"),
        ("def f(n):\n    if ASM:\n        return n - 1", "compiled code"),
        ("def f(n):\n    kernel[(n,)](num_warps=n - 1)", "num_warps"),
        ("def f(n):\n    raise ValueError(n - 1)", "errors"),
        ("def f(n=3 - 1):\n    pass", "defaults"),
        ("def f(n):\n    if ASM:\n        return 0\n    else:\n        return n - 1", None),
    ],
)
def test_code_without_a_result_is_left_out(text: str, reason: str | None) -> None:
    source = Source(text, "kernels/toy.py")
    ((node, _),) = source.mutants({"swap operands": KERNEL_RULES["swap operands"]})
    found = reason_to_leave_out(source, node)
    assert reason in found if reason and found else found is reason


def test_helpers_are_searched_with_all_that_import_them() -> None:
    names = modules_that_import("vila_triton.kernels._int4_dequant")
    assert {"vila_triton.kernels.int4_matmul_splitk", "vila_triton.kernels.int4_swiglu"} <= names
    assert "vila_triton.kernels.rms_norm" not in names
    assert source_files(["rms_norm"]) == ["kernels/_launch.py", "kernels/rms_norm.py", "kernels/rowwise.py"]


def misbehave(job: str, extend: Callable[[float], None]) -> str:
    extend(0.2 if job in ("hang", "spin") else 60.0)
    if job == "hang":
        time.sleep(60)
    while job == "spin":
        pass
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "raise":
        raise KeyError("nothing")
    return "well"


def test_processes_that_hang_die_or_raise_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "IDLE", 10.0)
    jobs = deque(["hang", "spin", "die", "raise", "return"])
    found: dict[str, Any] = dict(run_processes(misbehave, jobs, 2))
    assert (
        found["hang"] == found["spin"] == "hung" and found["die"] == "crashed: signal 9" and found["return"] == "well"
    )
    assert "KeyError: 'nothing'" in found["raise"]
    assert {name for name, x in found.items() if isinstance(x, Failed)} == {"hang", "spin", "die", "raise"}


def test_line_map_names_the_tests_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert format_lines([3, 1, 2, 7]) == "1-3,7"
    assert list(parse_lines("1-3,7")) == [range(1, 4), range(7, 8)]
    hashes = {"test_a.py": "x", "kernels/a.py": "1"}
    lines = {"kernels/a.py": {"test_a.py::slow": "1-9", "test_a.py::fast": "5", "test_a.py::other": "20"}}
    seconds = {"test_a.py::slow": 2.0, "test_a.py::fast": 0.1, "test_a.py::other": 0.2}
    row = {"kind": "lines", "test_file": "test_a.py", "hashes": hashes, "seconds": seconds, "lines": lines}
    (tmp_path / "test_a.py").touch()
    (tmp_path / "map").write_text(json.dumps(row))
    monkeypatch.setattr("bench.measure.rows.ROOT", tmp_path)
    current = {"test_a.py": "x", "kernels/a.py": "1", "kernels/b.py": "1"}
    monkeypatch.setattr(line_map, "file_hash", lambda file: current[file])
    assert list(LineMap(tmp_path / "map").tests("kernels/a.py", 4, 5)) == ["test_a.py::fast", "test_a.py::slow"]
    every = ["test_a.py::fast", "test_a.py::other", "test_a.py::slow"]
    assert list(LineMap(tmp_path / "map").tests("kernels/a.py", 30, 30)) == every  # a constant, read by the import
    current["kernels/a.py"] = "2"
    assert list(LineMap(tmp_path / "map").tests("kernels/a.py", 5, 5)) == every
    current["test_a.py"] = "y"
    assert list(LineMap(tmp_path / "map").tests("kernels/a.py", 5, 5)) == ["test_a.py"]
    assert not LineMap(tmp_path / "map").tests("kernels/b.py", 5, 5)


def test_table_counts_what_found_each_mutant() -> None:
    change = {"file": "a.py", "line": 1, "rule": "r", "before": "x", "after": "y", "detail": ""}
    found = ["check", "import", "tests", "hung", "", ""]
    rows = [{"id": str(i), **change, "found_by": by} for i, by in enumerate(found)]
    lines = list(report_lines(rows, {"5": {}}))
    assert "| a.py | 6 | 2 | 1 | 1 | 1 | 1 |" in lines
    assert "found 4 of 5 (80.0 %), 1 survived; 1 of 6 are equivalent" in lines
    assert lines[-1] == "4  a.py:1  r: `x` -> `y`"


def test_command_finds_mutants_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.mutants", "kernels/swiglu.py", "--seed", "2", "--check-seconds", "20"]
    command += ["--journal", str(tmp_path / "journal"), "--table", str(tmp_path / "table.md"), "--processes", "1"]
    first = subprocess.run([*command, "--count", "2"], cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 mutants of 1 files, 2 to run\n" in first.stdout and "found 2 of 2 (100.0 %)" in first.stdout
    again = subprocess.run([*command, "--count", "2"], cwd=ROOT, capture_output=True, text=True)
    assert "2 mutants of 1 files, 0 to run\n" in again.stdout, again.stdout + again.stderr
    assert "| kernels/swiglu.py | 2 | 2 |" in (tmp_path / "table.md").read_text()
