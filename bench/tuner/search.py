"""The search of one implementation: its candidates, most promising first, pass cost model, compiler, gate and timer.

A candidate is a config with the sizes for which the compiler makes one kernel of it: it is compiled and gated once, and
timed at each of them. Candidates go in rounds, so that a run that is stopped early has times for the best of them.

Where the cost model is the timer, nothing is timed, and only candidates that a table may name are gated: interpreted
gates are then nearly all of the work, and the predictions for the others do not depend on them. There each candidate is
emulated after it was compiled, and what it wastes is added to its predictions, by which it may be dropped after all.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any

from vila_triton.hashing import canonical_json, short_hash
from vila_triton.registry import OPS, Impl, tuned_tables
from vila_triton.registry.interpreter import uses_triton_kernels
from vila_triton.registry.search_space import Config

from ..correctness import error_budget, gate, guarded_memory
from ..emulator.compile import EMULATED_TARGETS
from ..emulator.counters import sums
from ..measure.cases import Case
from . import cost_model
from .jobs import COMPILERS, compile_equivalent_sizes
from .journal import Journal
from .workers import Workers

COST_MODEL = "cost model"
ROUND_SIZE = 4  # candidates for each worker


@dataclass(frozen=True)
class SearchPlan:
    """The settings of a search. timer: "gpu", "cpu" or "cost model"; budget: seconds for each of the two runs of a
    time.
    """

    timer: str
    device: str
    gpu: cost_model.GpuModel
    worse_than: float
    budget: float
    stamp: Mapping[str, str]


@dataclass(frozen=True)
class Candidate:
    """A config, the sizes that the compiler sees, and the sizes it is to be timed at, each with the
    predicted seconds.
    """

    config: Config
    compiled_sizes: Mapping[str, Any]
    timed_sizes: list[tuple[Mapping[str, Any], float | None]]


def source_hash(*modules: Any) -> str:
    """Returns a hash of the files of some modules."""
    return short_hash(*(Path(module.__file__).read_bytes() for module in modules))


def search_fingerprint(impl: Impl, plan: SearchPlan) -> dict[str, Any]:
    """Returns the first row of a journal: if any of it changes, earlier results no longer hold."""
    return {
        "op": impl.op,
        "impl": impl.name,
        **tuned_tables.entry_fingerprint(impl),
        "pruner": short_hash(source_hash(cost_model, sums).encode(), repr((plan.gpu, plan.worse_than)).encode()),
        "gate": source_hash(gate, error_budget, guarded_memory),
        "device": plan.device,
        "timer": plan.timer,
    }


def all_configs(impl: Impl, sizes: Mapping[str, Any]) -> list[Config]:
    """Returns the configs of the file, then those of its search space, each once."""
    candidates = [*impl.configs, *(impl.space.configs(sizes) if impl.space else [])]
    return list({canonical_json(dict(config)): config for config in candidates}.values())


class Search:
    """A search and its journal."""

    def __init__(
        self, impl: Impl, cases: Sequence[Case], plan: SearchPlan, folder: Path, max_candidates: int | None = None
    ):
        """max_candidates: only so many candidates are tried, the most promising ones; None: all."""
        self.impl, self.plan = impl, plan
        self.journal = Journal(folder, search_fingerprint(impl, plan))
        self.sizes = [dict(case.sizes) for case in cases]
        self.candidates = self.rank_candidates()[:max_candidates]

    @property
    def num_done(self) -> int:
        """The number of candidates whose results are complete."""
        return sum(self.is_finished(c) for c in self.candidates)

    def rank_candidates(self) -> list[Candidate]:
        """Returns the candidates that the cost model keeps, and writes those it drops to the journal: first the file's
        own configs, which are always kept, then by the least ratio to the best prediction; kernels of different sizes
        take turns.
        """
        by_kernel: dict[str, dict[str, Candidate]] = {}  # by the sizes the compiler sees, then by config
        promise: dict[tuple[str, str], float] = {}
        domain = OPS[self.impl.op].domain
        for sizes in self.sizes:
            compiled_sizes = compile_equivalent_sizes(domain, sizes)
            predicted = [
                (c, cost_model.predict_seconds(self.impl, c, sizes, self.plan.gpu))
                for c in all_configs(self.impl, sizes)
            ]
            best = min((p for _, p in predicted if p is not None), default=None)
            for number, (config, seconds) in enumerate(predicted):
                ratio = seconds / best if seconds is not None and best else 1.0
                if ratio > self.plan.worse_than and number >= len(self.impl.configs):
                    reason = f"predicted {ratio:.1f} times as long as the best"
                    self.record(config, sizes, seconds, "cost", reason=reason)
                    continue
                kernel_candidates, name = (
                    by_kernel.setdefault(canonical_json(compiled_sizes), {}),
                    canonical_json(dict(config)),
                )
                kernel_candidates.setdefault(name, Candidate(config, compiled_sizes, [])).timed_sizes.append(
                    (sizes, seconds)
                )
                is_own_config = number < len(self.impl.configs)
                key = canonical_json(compiled_sizes), name
                promise[key] = min(promise.get(key, inf), 0.0 if is_own_config else ratio)
        ranked = [
            sorted(by_config.items(), key=lambda item: promise[kernel, item[0]])
            for kernel, by_config in by_kernel.items()
        ]
        return [item[1] for rank in zip_longest(*ranked) for item in rank if item]

    def record(
        self, config: Config, sizes: Mapping[str, Any], predicted: float | None, status: str, **rest: Any
    ) -> None:
        """Writes the row of a candidate at some sizes, unless there is one."""
        if not self.journal.get("tune", config, sizes):
            fields = {"status": status, "reason": None, "seconds": None, "predicted": predicted}
            self.journal.add("tune", config, sizes, **fields | rest, timer=self.plan.timer, **self.plan.stamp)

    def is_finished(self, candidate: Candidate) -> bool:
        """Returns whether all results of a candidate are in the journal."""
        return all(self.journal.get("tune", candidate.config, sizes) for sizes, _ in candidate.timed_sizes)

    def run(self, workers: Workers, deadline: float, progress: Callable[[], None]) -> None:
        """Runs rounds until every result is known or the deadline (of `time.monotonic`) has passed."""
        left = [c for c in self.candidates if not self.is_finished(c)]
        batch_size = ROUND_SIZE * workers.num_workers
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            try:
                for _ in self.run_round(batch, workers, deadline):
                    progress()
            except TimeoutError:
                break
            progress()

    def run_round(self, batch: Sequence[Candidate], workers: Workers, deadline: float) -> Iterator[None]:
        """Compiles, gates and times some candidates; yields after each answer, which is in the journal by then.

        Errors: TimeoutError at the deadline.
        """
        if uses_triton_kernels(self.impl):
            batch = yield from self.run_stage("compile", "compiled", batch, workers, deadline)
        if self.plan.timer == COST_MODEL:
            if uses_triton_kernels(self.impl) and self.plan.gpu.arch in EMULATED_TARGETS:
                batch = yield from self.run_stage("emulate", "emulated", batch, workers, deadline)
                batch = self.drop_wasteful([self.add_waste(c) for c in batch])
            yield from self.gate_winners(batch, workers, deadline)
            return
        batch = yield from self.run_stage("gate", "gated", batch, workers, deadline)
        calls = [
            (c.config, *at) for c in batch for at in c.timed_sizes if not self.journal.get("tune", c.config, at[0])
        ]
        calls.sort(
            key=lambda call: canonical_json(call[1])
        )  # arguments are made once for all configs at the same sizes
        jobs = [self.make_job("time", config, sizes) for config, sizes, _ in calls]
        for i, answer in workers.run("time", jobs, deadline):
            self.record(*calls[i], "timed" if "seconds" in answer else "time", **answer)
            yield

    def add_waste(self, candidate: Candidate) -> Candidate:
        """Returns a candidate with the predictions that count what its emulation found wasted."""
        counts = self.journal.get("emulated", candidate.config, candidate.compiled_sizes)
        assert counts, f"no counts for {candidate}"

        def predict(sizes: Mapping[str, Any], seconds: float | None) -> float | None:
            if seconds is None:
                return None
            about = candidate.config, sizes, candidate.compiled_sizes
            return seconds + cost_model.wasted_seconds(self.impl, *about, counts, self.plan.gpu)

        timed_sizes = [(sizes, predict(sizes, seconds)) for sizes, seconds in candidate.timed_sizes]
        return replace(candidate, timed_sizes=timed_sizes)

    def drop_wasteful(self, batch: Sequence[Candidate]) -> list[Candidate]:
        """Returns the candidates that are kept now that their waste is known, as in `rank_candidates`; those that are
        dropped get their rows.
        """
        known = [(row["sizes"], row["seconds"]) for row in self.journal.entries["tune"].values()]
        best: dict[str, float] = {}
        for sizes, seconds in [*known, *(x for c in batch for x in c.timed_sizes)]:
            best[canonical_json(sizes)] = min(best.get(canonical_json(sizes), inf), seconds or inf)
        kept = []
        for c in batch:
            sizes_left = []
            for sizes, seconds in c.timed_sizes:
                ratio = (seconds or 0.0) / best[canonical_json(sizes)]
                if ratio > self.plan.worse_than and c.config not in self.impl.configs:
                    reason = f"predicted {ratio:.1f} times as long as the best, with what it wastes"
                    self.record(c.config, sizes, seconds, "cost", reason=reason)
                else:
                    sizes_left.append((sizes, seconds))
            if sizes_left:
                kept.append(replace(c, timed_sizes=sizes_left))
        return kept

    def gate_winners(self, batch: Sequence[Candidate], workers: Workers, deadline: float) -> Iterator[None]:
        """Gates the candidates that are predicted to be the best so far at some of their sizes, until the best of all
        sizes have passed. Of the others, which no table will name, only the prediction is kept.
        """
        left = list(batch)
        while best := self.predicted_best(left):
            for c in (yield from self.run_stage("gate", "gated", best, workers, deadline)):
                for sizes, seconds in c.timed_sizes:
                    self.record(c.config, sizes, seconds, "timed", seconds=seconds)
            left = [c for c in left if c not in best]
        for c in left:
            for sizes, seconds in c.timed_sizes:
                self.record(c.config, sizes, seconds, "predicted", seconds=seconds)

    def predicted_best(self, left: Sequence[Candidate]) -> list[Candidate]:
        """Returns the candidates that are predicted to be faster, at some sizes, than all others and than what passed
        the gate.
        """
        gated = [row for row in self.journal.entries["tune"].values() if row["status"] == "timed"]
        times = [(row["seconds"], canonical_json(row["config"]), row["sizes"]) for row in gated]
        times += [(seconds, canonical_json(dict(c.config)), sizes) for c in left for sizes, seconds in c.timed_sizes]
        fastest: dict[str, str] = {}
        for _, config, sizes in sorted(times, key=lambda time: time[:2], reverse=True):
            fastest[canonical_json(sizes)] = config
        return [
            c
            for c in left
            if any(fastest[canonical_json(s)] == canonical_json(dict(c.config)) for s, _ in c.timed_sizes)
        ]

    def run_stage(
        self, stage: str, kind: str, batch: Sequence[Candidate], workers: Workers, deadline: float
    ) -> Generator[None, None, list[Candidate]]:
        """Runs a stage; returns the candidates that pass it. Those that do not get their rows, with the reason."""
        pending = [c for c in batch if not self.journal.get(kind, c.config, c.compiled_sizes)]
        cheapest_sizes = [
            min((sizes for sizes, _ in c.timed_sizes), key=lambda s: OPS[self.impl.op].cost(**s)) for c in pending
        ]
        jobs = [
            self.make_job(stage, c.config, c.compiled_sizes if stage in COMPILERS else s)
            for c, s in zip(pending, cheapest_sizes)
        ]
        for i, answer in workers.run(stage, jobs, deadline):
            self.journal.add(kind, pending[i].config, pending[i].compiled_sizes, **answer)
            yield
        passed = []
        for c in batch:
            row = self.journal.get(kind, c.config, c.compiled_sizes)
            assert row, f"no answer for {c}"
            if row["reason"]:
                for sizes, predicted in c.timed_sizes:
                    self.record(c.config, sizes, predicted, stage, reason=row["reason"])
            else:
                passed.append(c)
        return passed

    def make_job(self, stage: str, config: Config, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a job of a stage."""
        fields = {"stage": stage, "op": self.impl.op, "impl": self.impl.name, "config": dict(config)}
        return {**fields, "sizes": dict(sizes), "arch": self.plan.gpu.arch, "budget": self.plan.budget}
