"""One search: the candidates of an implementation, most promising first, through cost model, compiler, gate and timer.

Where the cost model is the timer, nothing is timed, and only those that a table may name pass the gate: that is then
nearly all of the work, interpreted, and what is predicted of the others does not depend on it.

They go in rounds, so that a run that is stopped early has times for the best of them. A candidate is a config and the
sizes for which the compiler makes one kernel of it: it is compiled and gated once, and timed at each of them.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any

from vila_triton.registry import OPS, Impl, tuned_tables
from vila_triton.registry.interpreter import holds_kernels
from vila_triton.registry.search_space import Config, canonical, digest

from ..correctness import error_budget, gate, guarded_memory
from ..measure.cases import Case
from . import cost_model
from .jobs import as_compiled
from .journal import Journal
from .workers import Workers

COST_MODEL = "cost model"
ROUND = 4  # candidates for each worker


@dataclass(frozen=True)
class Plan:
    """How a search is made. timer: "gpu", "cpu" or "cost model"; budget: seconds for each of the two runs of a time."""

    timer: str
    device: str
    gpu: cost_model.Gpu
    worse_than: float
    budget: float
    stamp: Mapping[str, str]


@dataclass(frozen=True)
class Candidate:
    """`compiled`: the sizes the compiler sees; `at`: the sizes it is to be timed at, with the predicted seconds."""

    config: Config
    compiled: Mapping[str, Any]
    at: list[tuple[Mapping[str, Any], float | None]]


def source(*modules: Any) -> str:
    return digest(*(Path(module.__file__).read_bytes() for module in modules))


def identity(impl: Impl, plan: Plan) -> dict[str, Any]:
    """What a journal is for: with any of it changed, what was found no longer holds."""
    return {
        "op": impl.op,
        "impl": impl.name,
        **tuned_tables.identity(impl),
        "pruner": digest(source(cost_model).encode(), repr((plan.gpu, plan.worse_than)).encode()),
        "gate": source(gate, error_budget, guarded_memory),
        "device": plan.device,
        "timer": plan.timer,
    }


def configs(impl: Impl, sizes: Mapping[str, Any]) -> list[Config]:
    """The configs of the file, then those of its space, each once."""
    every = [*impl.configs, *(impl.space.configs(sizes) if impl.space else [])]
    return list({canonical(dict(config)): config for config in every}.values())


class Search:
    """A search and its journal. `done` says of how many of the candidates all is known."""

    def __init__(self, impl: Impl, chosen: Sequence[Case], plan: Plan, folder: Path, most: int | None = None):
        """`most`: only so many candidates, the most promising ones."""
        self.impl, self.plan = impl, plan
        self.journal = Journal(folder, identity(impl, plan))
        self.sizes = [dict(case.sizes) for case in chosen]
        self.candidates = self.find()[:most]

    @property
    def done(self) -> int:
        return sum(self.finished(c) for c in self.candidates)

    def find(self) -> list[Candidate]:
        """The candidates the cost model leaves, those it drops go to the journal: first the file's own configs, which
        stay in any case, then by the least ratio to the best prediction; kernels of different sizes take turns.
        """
        found: dict[str, dict[str, Candidate]] = {}  # by the sizes the compiler sees, then by config
        promise: dict[tuple[str, str], float] = {}
        domain = OPS[self.impl.op].domain
        for sizes in self.sizes:
            compiled = as_compiled(domain, sizes)
            predicted = [(c, cost_model.predict(self.impl, c, sizes, self.plan.gpu)) for c in configs(self.impl, sizes)]
            best = min((p for _, p in predicted if p is not None), default=None)
            for number, (config, seconds) in enumerate(predicted):
                worse = seconds / best if seconds is not None and best else 1.0
                if worse > self.plan.worse_than and number >= len(self.impl.configs):
                    reason = f"predicted {worse:.1f} times as long as the best"
                    self.tell(config, sizes, seconds, "cost", reason=reason)
                    continue
                of_kernel, name = found.setdefault(canonical(compiled), {}), canonical(dict(config))
                of_kernel.setdefault(name, Candidate(config, compiled, [])).at.append((sizes, seconds))
                listed = number < len(self.impl.configs)
                key = canonical(compiled), name
                promise[key] = min(promise.get(key, inf), 0.0 if listed else worse)
        ranked = [sorted(of.items(), key=lambda item: promise[kernel, item[0]]) for kernel, of in found.items()]
        return [item[1] for rank in zip_longest(*ranked) for item in rank if item]

    def tell(self, config: Config, sizes: Mapping[str, Any], predicted: float | None, status: str, **rest: Any) -> None:
        """Write the row of a candidate at some sizes, unless there is one."""
        if not self.journal.get("tune", config, sizes):
            about = {"status": status, "reason": None, "seconds": None, "predicted": predicted}
            self.journal.add("tune", config, sizes, **about | rest, timer=self.plan.timer, **self.plan.stamp)

    def finished(self, candidate: Candidate) -> bool:
        return all(self.journal.get("tune", candidate.config, sizes) for sizes, _ in candidate.at)

    def run(self, workers: Workers, deadline: float, progress: Callable[[], None]) -> None:
        """Go on until all is known or the deadline (of `time.monotonic`) has passed, whatever is under way then."""
        left = [c for c in self.candidates if not self.finished(c)]
        step = ROUND * workers.width
        for start in range(0, len(left), step):
            batch = left[start : start + step]
            try:
                for _ in self.round(batch, workers, deadline):
                    progress()
            except TimeoutError:
                break
            progress()

    def round(self, batch: Sequence[Candidate], workers: Workers, deadline: float) -> Iterator[None]:
        """Compile, gate and time some candidates; yields after each answer, which is in the journal by then.

        Errors: TimeoutError at the deadline.
        """
        if holds_kernels(self.impl):
            batch = yield from self.filtered("compile", "compiled", batch, workers, deadline)
        if self.plan.timer == COST_MODEL:
            yield from self.winners(batch, workers, deadline)
            return
        batch = yield from self.filtered("gate", "gated", batch, workers, deadline)
        calls = [(c.config, *at) for c in batch for at in c.at if not self.journal.get("tune", c.config, at[0])]
        calls.sort(key=lambda call: canonical(call[1]))  # arguments are made once for all configs at the same sizes
        jobs = [self.job("time", config, sizes) for config, sizes, _ in calls]
        for i, answer in workers.run("time", jobs, deadline):
            self.tell(*calls[i], "timed" if "seconds" in answer else "time", **answer)
            yield

    def winners(self, batch: Sequence[Candidate], workers: Workers, deadline: float) -> Iterator[None]:
        """Gate those that are predicted to be the best so far at some of their sizes, until the best of all sizes have
        passed; of the others, which no table will name, the prediction alone is kept.
        """
        left = list(batch)
        while first := self.best(left):
            for c in (yield from self.filtered("gate", "gated", first, workers, deadline)):
                for sizes, seconds in c.at:
                    self.tell(c.config, sizes, seconds, "timed", seconds=seconds)
            left = [c for c in left if c not in first]
        for c in left:
            for sizes, seconds in c.at:
                self.tell(c.config, sizes, seconds, "predicted", seconds=seconds)

    def best(self, left: Sequence[Candidate]) -> list[Candidate]:
        """Those that are predicted to be faster, at some sizes, than all others and than what has passed the gate."""
        gated = [row for row in self.journal.found["tune"].values() if row["status"] == "timed"]
        times = [(row["seconds"], canonical(row["config"]), row["sizes"]) for row in gated]
        times += [(seconds, canonical(dict(c.config)), sizes) for c in left for sizes, seconds in c.at]
        fastest: dict[str, str] = {}
        for _, config, sizes in sorted(times, key=lambda time: time[:2], reverse=True):
            fastest[canonical(sizes)] = config
        return [c for c in left if any(fastest[canonical(s)] == canonical(dict(c.config)) for s, _ in c.at)]

    def filtered(
        self, stage: str, kind: str, batch: Sequence[Candidate], workers: Workers, deadline: float
    ) -> Generator[None, None, list[Candidate]]:
        """The candidates that pass a stage; those that do not get their rows, with the reason."""
        new = [c for c in batch if not self.journal.get(kind, c.config, c.compiled)]
        cheapest = [min((sizes for sizes, _ in c.at), key=lambda s: OPS[self.impl.op].cost(**s)) for c in new]
        jobs = [self.job(stage, c.config, c.compiled if stage == "compile" else s) for c, s in zip(new, cheapest)]
        for i, answer in workers.run(stage, jobs, deadline):
            self.journal.add(kind, new[i].config, new[i].compiled, **answer)
            yield
        passed = []
        for c in batch:
            row = self.journal.get(kind, c.config, c.compiled)
            assert row, f"no answer for {c}"
            if row["reason"]:
                for sizes, predicted in c.at:
                    self.tell(c.config, sizes, predicted, stage, reason=row["reason"])
            else:
                passed.append(c)
        return passed

    def job(self, stage: str, config: Config, sizes: Mapping[str, Any]) -> dict[str, Any]:
        about = {"stage": stage, "op": self.impl.op, "impl": self.impl.name, "config": dict(config)}
        return {**about, "sizes": dict(sizes), "arch": self.plan.gpu.arch, "budget": self.plan.budget}
