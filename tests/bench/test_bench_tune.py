"""A search refuses what is wrong, goes on where it was killed, and ends in the same table whoever does its jobs."""

import inspect
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from processes import alive, children, gone
from toy_op import TOY, load

from bench import tune
from bench.measure import rows
from bench.measure.cases import Case
from bench.tuner import cost_model, jobs, search, table, workers
from bench.tuner.jobs import STAGES, Answer, Job, run_job
from bench.tuner.workers import ProcessPool
from vila_triton.registry import OPS, Impl, Op, discover, tuned_tables
from vila_triton.registry.interpreter import uses_triton_kernels

ROOT = Path(__file__).resolve().parents[2]
DEVICE = f"{cost_model.gpu_of_arch('sm_90').name} (cost model)"
STAMP = {"device": DEVICE, "date": "2026-01-01", "commit": "abc", "torch": "2"}
PLAN = search.SearchPlan("cpu", DEVICE, cost_model.gpu_of_arch("sm_90"), 1e9, 0.01, STAMP)
ON_PAPER = replace(PLAN, timer=search.COST_MODEL)


IGNORED = shutil.ignore_patterns("__pycache__", "*.safetensors", "peers")


class Inline:
    """Does jobs here and now, slowly if asked to, so that there is a moment to be killed in."""

    num_workers = 2

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.asked = seconds, []

    def run(self, stage: str, jobs: Sequence[Job], deadline: float = inf) -> Iterator[tuple[int, Answer]]:
        for i, job in enumerate(jobs):
            self.asked.append((stage, job["config"]["BLOCK"]))
            time.sleep(self.seconds)
            yield i, run_job(job)

    def close(self) -> None:
        pass


@pytest.fixture
def doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Op:
    """The toy, of which a call takes as long every time; nothing lies on a device, whose release takes seconds."""
    monkeypatch.setattr(jobs, "release_memory", lambda device: None)
    monkeypatch.setitem(STAGES, "time", lambda job: {"seconds": 1e-6 * job["config"]["BLOCK"], "again": 0.0})
    return load(tmp_path, monkeypatch)


def cases(op: Op) -> list[Case]:
    return [Case(op.name, "toy", {"m": m, "n": 8, "dtype": "float32"}) for m in (1, 6, 64, 1000)]


def searched(op: Op, folder: Path, workers: Inline, plan: search.SearchPlan = PLAN) -> search.Search:
    found = search.Search(op.impls["blocks"], cases(op), plan, folder)
    found.run(workers, float("inf"), lambda: None)
    return found


def written(op: Op, folder: Path, workers: Inline) -> bytes:
    """The bytes of the table after a search."""
    found = searched(op, folder, workers)
    held = list(found.journal.entries["tune"].values())
    entry = table.build_entry(search.search_fingerprint(op.impls["blocks"], PLAN), held, op.dynamic_sizes)
    assert entry
    return table.write_table(folder, DEVICE, entry).read_bytes()


def test_search_killed_ten_times_makes_the_same_table(doubled: Op, tmp_path: Path) -> None:
    unbroken = written(doubled, tmp_path / "unbroken", Inline())
    rng, kills = random.Random(0), 0
    for _ in range(10):
        child = os.fork()
        if not child:
            written(doubled, tmp_path / "broken", Inline(seconds=0.1))
            os._exit(0)
        time.sleep(rng.uniform(0.05, 0.4))
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert kills == 10
    again = Inline()
    assert written(doubled, tmp_path / "broken", again) == unbroken
    assert len(again.asked) > 0  # there was something left to do
    assert len({tuple(asked) for asked in again.asked}) < len(cases(doubled)) * 14  # and not everything


def test_journal_cut_at_any_byte_is_resumed(doubled: Op, tmp_path: Path) -> None:
    unbroken = written(doubled, tmp_path / "a", Inline())
    (whole,) = (tmp_path / "a").glob("*.jsonl")
    content, rng = whole.read_bytes(), random.Random(1)
    for cut in [0, 1, *(rng.randrange(len(content)) for _ in range(4)), len(content) - 1]:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / whole.name).write_bytes(content[:cut])
        assert written(doubled, tmp_path / "b", Inline()) == unbroken, f"cut at byte {cut}"
        shutil.rmtree(tmp_path / "b")


def test_candidate_with_wrong_numbers_gets_no_time(doubled: Op, tmp_path: Path) -> None:
    found = searched(doubled, tmp_path / "out", Inline()).journal.entries["tune"].values()
    assert {row["config"]["wrong"] for row in found if row["status"] == "timed"} == {False}
    refused = [row for row in found if row["config"]["wrong"]]
    assert refused and all(r["status"] == "gate" and r["seconds"] is None and "are off" in r["reason"] for r in refused)


def gated(job: Job, least: int) -> Answer:
    """Return the answer of a gate for which all blocks below `least` are wrong."""
    return {"reason": "wrong" if job["config"]["wrong"] or job["config"]["BLOCK"] < least else None}


@pytest.mark.parametrize("least", [1, 2])
def test_cost_model_timer_gates_only_candidates_of_the_table(
    least: int, doubled: Op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here what is wrong is predicted to be the fastest."""
    monkeypatch.setattr(
        cost_model, "predict_seconds", lambda _, config, sizes, gpu: 1e-6 * config["BLOCK"] - 1e-7 * config["wrong"]
    )
    monkeypatch.setitem(STAGES, "gate", lambda job: gated(job, least))
    workers = Inline()
    looked = searched(doubled, tmp_path, workers, ON_PAPER)
    told = list(looked.journal.entries["tune"].values())
    assert looked.num_done == len(looked.candidates) and len(told) == sum(len(c.timed_sizes) for c in looked.candidates)
    assert {block for _, block in workers.asked} == set(range(1, least + 1))  # not the others
    found = table.build_entry({}, told, doubled.dynamic_sizes)
    assert found and {r["config"]["BLOCK"] for r in found["ranges"]} == {least}
    assert not any(r["config"]["wrong"] for r in [*found["ranges"], found["otherwise"]])
    assert found["candidates"]["timed"] == len(cases(doubled)) and found["candidates"]["predicted"] > 0
    assert all(row["seconds"] for row in told if row["status"] in table.TIMED_STATUSES)


def test_candidates_ruled_out_by_cost_model_or_compiler_do_not_run(
    doubled: Op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = search.SearchPlan(search.COST_MODEL, DEVICE, cost_model.gpu_of_arch("sm_90"), 3.0, 0.01, STAMP)
    monkeypatch.setattr(search, "uses_triton_kernels", lambda impl: True)
    spilled = {"reason": "spills 8 bytes"}
    monkeypatch.setitem(STAGES, "compile", lambda job: spilled if job["config"]["BLOCK"] == 4 else {"reason": None})
    monkeypatch.setitem(
        STAGES, "emulate", lambda job: {"reason": "has a fault" if job["config"]["BLOCK"] == 2 else None}
    )
    monkeypatch.setattr(cost_model, "wasted_seconds", lambda *about: 0.0)
    workers = Inline()
    found = list(searched(doubled, tmp_path / "out", workers, plan).journal.entries["tune"].values())
    dropped = [row for row in found if row["status"] == "cost"]
    assert dropped and all(row["reason"].startswith("predicted") and row["config"]["BLOCK"] > 1 for row in dropped)
    assert {row["reason"] for row in found if row["status"] == "compile"} == {"spills 8 bytes"}
    assert {row["reason"] for row in found if row["status"] == "emulate"} == {"has a fault"}
    assert ("compile", 4) in workers.asked and ("emulate", 4) not in workers.asked
    assert ("emulate", 2) in workers.asked and not {2, 4} & {block for stage, block in workers.asked if stage == "gate"}
    run = {row["config"]["BLOCK"] for row in found if row["status"] == "timed"}
    assert set(sys.modules["toy_doubled"].ran) <= run


def test_compile_job_finds_spills_and_too_much_shared_memory() -> None:
    about = {"stage": "compile", "impl": "triton", "arch": "sm_89"}
    wide = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 5}
    long = {"BLOCK": 8192, "num_warps": 1, "num_stages": 1}
    small = {"BLOCK": 128, "num_warps": 1, "num_stages": 1}
    rows, sizes = (
        {"rows": 32, "e": 288, "dtype": "float16"},
        {"m": 16, "n": 80, "G": 5, "group": 128, "dtype": "float16", "order": "sub", "bias": False},
    )
    workers = ProcessPool(1)
    try:
        ask = lambda **job: workers.run_job("compile", {**about, **job})  # noqa: E731
        assert ask(op="rms_norm", config=small, sizes=rows)["reason"] is None
        assert "spills" in ask(op="rms_norm", config=long, sizes=rows)["reason"]
        assert "shared memory" in ask(op="int4_matmul", impl="packed", config=wide, sizes=sizes)["reason"]
    finally:
        workers.close()


def test_search_space_of_every_kernel_contains_and_prices_its_configs() -> None:
    discover()
    """But for the first rungs of ladders, which nobody tunes."""
    every = (impl for op in OPS.values() for impl in op.impls.values())
    kernels: list[Impl] = [impl for impl in every if uses_triton_kernels(impl) and impl.name not in ("naive", "simple")]
    assert len(kernels) >= 12
    for impl in kernels:
        assert impl.space and impl.space.launch_cost, f"{impl.op} has no space"
        names = set(inspect.signature(impl.fn).parameters)
        tried = [(case, search.all_configs(impl, case.sizes)) for case in tune.cases(impl.op)]
        assert max(len(configs) for _, configs in tried) > len(impl.configs), f"{impl.op} {impl.name}: nothing to try"
        for case, configs in tried:
            assert configs, f"{impl.name}, {case}: nothing to try"
            for config in configs:
                assert (
                    set(config) <= names and (cost_model.predict_seconds(impl, config, case.sizes, PLAN.gpu) or 0) > 0
                )


def test_journal_of_a_changed_kernel_is_stale_and_not_used(
    doubled: Op, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    file = searched(doubled, out, Inline(), ON_PAPER).journal.file
    content = file.read_bytes()
    source = doubled.impls["blocks"].file
    source.write_text(source.read_text() + "\n")
    options = ["doubled", "--timer", "cost-model", "--worse-than", "1e9", "--report", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["tune", *options])
    assert tune.main() == 1
    said = capsys.readouterr().out
    assert f"stale: {file.name} was made with another kernel; it is left as it is and not used" in said
    assert "nothing was timed" in said and file.read_bytes() == content and len(list(out.iterdir())) == 2


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this one in which the toy op is one file of kernels/ and one of configs/bench/."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("vila_triton", "kernels", "bench", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=IGNORED)
    (copy / "kernels" / "doubled.py").write_text(TOY)
    (copy / "configs" / "bench" / "doubled.toml").write_text("[toy]\nm = [1, 6, 64, 1000]\nn = 8\n")
    return copy


def run(checkout: Path, out: str, victim: str, *options: str) -> tuple[bytes, list[dict]]:
    """bench.tune from the command line; the first to run BLOCK 8 kills `victim`: itself, or its parent."""
    (checkout / "victim").write_text(victim)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"VICTIM": str(checkout / "victim")}
    command = [
        sys.executable,
        "-m",
        "bench.tune",
        "doubled",
        "--timer",
        "cpu",
        "--worse-than",
        "1e9",
        "--workers",
        "2",
    ]
    done = subprocess.run([*command, "--out", out, *options], cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (checkout / "victim").exists(), "nobody was killed"
    (journal,) = (checkout / out).glob("*.jsonl")
    return next((checkout / out).glob("*.json")).read_bytes(), list(rows.read(journal, kind="tune"))


class TimesHere(ProcessPool):
    """Processes, but what is timed is timed in this one: one start less."""

    def run(self, stage: str, jobs: Sequence[Job], deadline: float = inf) -> Iterator[tuple[int, Answer]]:
        return enumerate(map(run_job, jobs)) if stage == "time" else super().run(stage, jobs, deadline)


@contextmanager
def hanging(checkout: Path, out: Path, *options: str) -> Iterator[int]:
    """A search in a process of its own, which has come to a candidate that never ends; all it started is gone after."""
    (out / "hangs").unlink(missing_ok=True)
    searching = os.fork()
    if not searching:
        os.environ["HANGING"] = str(out / "hangs")
        sys.stdout = (out / "said").open("w")
        common = ["doubled", "--timer", "cpu", "--worse-than", "1e9", "--workers", "1", "--out", str(out)]
        sys.argv = ["bench.tune", *common, *options]
        workers.rows.CHILD_FOLDER, tune.ProcessPool = checkout, TimesHere
        os._exit(tune.main())
    while not (out / "hangs").exists():
        time.sleep(0.05)
        assert os.waitpid(searching, os.WNOHANG) == (0, 0)
    started = list(children(searching))
    assert started and all(map(alive, started))
    yield searching
    assert all(map(gone, started)) and not list(out.glob("*.new"))


def ended(process: int) -> int:
    """The exit code of a process, within 30 seconds."""
    assert gone(process, 30)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_ended_search_leaves_its_table_and_no_process(doubled: Op, checkout: Path, tmp_path: Path) -> None:
    """By SIGTERM, by its deadline, by SIGKILL, each time in the middle of a candidate that never ends."""
    out = tmp_path / "out"
    out.mkdir()

    def entry() -> dict:
        (file,) = out.glob("*.json")
        (found,) = tuned_tables.read_table(file)["entries"]
        file.unlink()
        return found

    with hanging(checkout, out) as process:
        os.kill(process, signal.SIGTERM)
        assert ended(process) == 130
    assert "stopped with" in (out / "said").read_text()
    first = entry()
    assert first["ranges"] and first["candidates"]["timed"]

    with hanging(checkout, out, "--minutes", "0.15") as process:
        assert ended(process) == 0
    assert "out of time with" in (out / "said").read_text()
    assert entry()["ranges"] == first["ranges"]

    with hanging(checkout, out) as process:
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL


def test_candidate_out_of_memory_gets_a_row(doubled: Op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(jobs, "time_call", full)
    monkeypatch.setitem(STAGES, "time", jobs.time_job)
    looked = search.Search(doubled.impls["blocks"], cases(doubled)[:1], PLAN, tmp_path, 2)
    looked.run(Inline(), inf, lambda: None)
    told = list(looked.journal.entries["tune"].values())
    assert [row["status"] for row in told if not row["config"]["wrong"]] == ["time"]
    assert {row["reason"] for row in told if row["status"] == "time"} == {"OutOfMemoryError: CUDA out of memory"}


def test_limited_candidates_are_the_most_promising(doubled: Op, tmp_path: Path) -> None:
    every = search.Search(doubled.impls["blocks"], cases(doubled), PLAN, tmp_path).candidates
    few = search.Search(doubled.impls["blocks"], cases(doubled), PLAN, tmp_path, 5).candidates
    assert few == every[:5] and len(every) > 5


@pytest.mark.slow
def test_killed_worker_loses_no_result(checkout: Path) -> None:
    _, found = run(checkout, "out", "self")
    count = {status: sum(row["status"] == status for row in found) for status in ("timed", "gate")}
    assert count == {"timed": 2 + 4 + 7 + 7, "gate": 2 + 4 + 7 + 7}
    assert not [row for row in found if row["reason"] and "died" in row["reason"]]


def test_ray_cluster_with_a_killed_worker_makes_the_same_table(checkout: Path) -> None:
    pytest.importorskip("ray")  # an extra that the tests' own does not bring
    here, _ = run(checkout, "here", "self")
    assert run(checkout, "cluster", "parent", "--ray")[0] == here
