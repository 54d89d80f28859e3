"""How long the steps of `bench.suite` take, reckoned before there is a GPU to run them on: counts times units.

Counts come from the steps' own command lines, read by the parsers of the commands themselves: the cases, the
implementations that are registered, the candidates that the cost model ranks first. Units are those of
configs/bench/suite.toml. What is timed for a budget of seconds takes these seconds, the unit `second`; how long one
call takes is what datasheets allow, times the unit `slack`. What several processes do at once counts once a round.
"""

import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vila_triton.paths import config_dir
from vila_triton.registry import OPS, REFERENCE, Impl
from vila_triton.registry.interpreter import holds_kernels
from vila_triton.registry.kernel_config import configured
from vila_triton.registry.search_space import canonical

from .. import accuracy, model, ops, tune
from ..correctness import gate
from ..correctness.error_budget import budget
from ..tuner import cost_model
from ..tuner.jobs import as_compiled
from ..tuner.search import Plan, Search
from . import model_configs, step_cost
from .cases import Case, cases
from .model_steps import steps as steps_of_model
from .suite_plan import Step, allot
from .timing import copies

Call = tuple[Impl, Mapping[str, Any], Mapping[str, Any]]  # implementation, config, sizes
ARCH = "sm_90"
VARIETIES = 3 * 2  # dtypes and layouts in which bench.correctness runs a config
STAGES = 3  # of a search, each with processes of its own


@cache
def table() -> Mapping[str, Any]:
    return tomllib.loads((config_dir() / "bench" / "suite.toml").read_text())


@cache
def machine() -> Mapping[str, Any]:
    sheets = tomllib.loads((config_dir() / "bench" / "gpus.toml").read_text())
    return {**table()["machine"], **sheets[table()["machine"]["gpu"]]}


def unit(name: str) -> float:
    return 1.0 if name == "second" else table()["units"][name]


def seconds(counts: Mapping[str, float]) -> float:
    return sum(unit(name) * count for name, count in counts.items())


def lines(plan: Sequence[Step], limit: float) -> Iterator[str]:
    """The estimate of each step that is kept beside its limit, what it is made of, and all of them together."""
    limits = allot(plan, limit)
    kept = [step for step in plan if step.name in limits]
    total = 0.0
    yield f"{'':24}{'estimate':>10}{'limit':>8}"
    for step in kept:
        found = count(step, limits[step.name], kept)
        total += min(seconds(found), limits[step.name])
        too_long = "  ends early, by its own clock" if step.keeps_time else "  DOES NOT FIT"
        fits = "" if seconds(found) <= limits[step.name] else too_long
        parts = sorted(found, key=lambda name: -unit(name) * found[name])
        made_of = ", ".join(f"{found[name]:.4g} {name} {unit(name) * found[name]:.1f} s" for name in parts)
        yield f"{step.name:24}{seconds(found):8.0f} s{limits[step.name]:6.0f} s  {made_of}{fits}"
    yield f"{'together':24}{total:8.0f} s{sum(limits.values()):6.0f} s, of {limit:.0f} s"


def counts(**each: float) -> Counter[str]:
    return Counter(each)  # pyright: ignore[reportArgumentType, reportReturnType]


def count(step: Step, limit: float, plan: Sequence[Step]) -> Counter[str]:
    """How often a step does what units are of."""
    name, *words = step.command(limit)
    return COUNTS[name](words, plan)


def kernels(calls: Sequence[Call]) -> int:
    """How many of the calls are of Triton kernels and told apart by the compiler."""
    return len(
        {
            (impl.op, impl.name, canonical(dict(config)), canonical(as_compiled(OPS[impl.op].domain, sizes)))
            for impl, config, sizes in calls
            if holds_kernels(impl)
        }
    )


@cache
def float64_calls() -> int:
    """References in float64 for the budget of one case, counted at a small one."""
    op, calls = OPS["swiglu"], 0
    reference = op.reference

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += args[0].dtype == torch.float64
        return reference(*args)

    args = op.example(s=8, f=16, dtype="float32", rng=torch.Generator().manual_seed(0), device="cpu")
    with patch.object(op, "reference", counted):
        budget(op, args)
    return calls


def checked(found: Sequence[Case]) -> Counter[str]:
    """The references of those cases whose own numbers are checked."""
    flops = [c.cost[0] for c in found if c.cost[0] <= gate.CASE_FLOPS["cuda"] and c.cost[1] <= gate.CASE_BYTES["cuda"]]
    return counts(float64_call=len(flops) * float64_calls(), float64_flop=sum(flops) * float64_calls())


def call_seconds(flops: float, size: float) -> float:
    return unit("slack") * max(flops / machine()["flops"], size / machine()["bandwidth"])


def timed(case: Case, budget: float) -> Counter[str]:
    """One figure: arguments and copies, a turn over them that warms up, one captured, two runs of five or more."""
    flops, size = case.cost
    held, _ = copies(max(1, size), machine()["cache"])
    turn = held * call_seconds(flops, size)
    return counts(figure=1, byte=size * held, launch=2 * held, second=2 * turn + 2 * max(budget, 5 * turn))


def served(case: Case) -> tuple[str, Mapping[str, Any]]:
    """What a call runs by default on a GPU of which there is no table."""
    op = OPS[case.op]
    choice = configured("cuda", "decode").get(case.op, REFERENCE)
    name = choice if isinstance(choice, str) else choice.at(case.sizes[op.varying[0]])
    return name, op.impls[name].configs[0]


def of_ops(words: Sequence[str], plan: Sequence[Step]) -> Counter[str]:
    from ..peers import dense, sdpa  # noqa: F401 (torch's own, which are sure to be there)

    args = ops.parser().parse_args(words)
    chosen = [case for op in args.ops for case in cases(op, args.case)]
    total = counts(start=1) + checked(chosen)
    calls: list[Call] = []
    for case in chosen:
        by_default = served(case) if args.served else None
        for impl, config in ops.wanted(case, args.impl, args.configs == "all", by_default):
            calls.append((impl, config, case.sizes))
            total += timed(case, args.budget)
    total["compile"] = kernels(calls)
    if args.gate == "full":
        kinds = {(impl.op, impl.name): impl for impl, _, _ in calls}
        total["correct"] = gate.EXAMPLES * len(kinds)
        total["compile"] += gate.EXAMPLES * sum(map(holds_kernels, kinds.values()))
    return total


def of_tune(words: Sequence[str], plan: Sequence[Step]) -> Counter[str]:
    args = tune.parser().parse_args(words)
    total = counts(start=1 + STAGES)
    with tempfile.TemporaryDirectory() as folder:
        for impl in tune.chosen(args):
            about = Plan("gpu", ARCH, cost_model.gpu(ARCH), args.worse_than, args.budget, {})
            search = Search(impl, cases(impl.op, args.case), about, Path(folder), args.candidates)
            rounds = -(-len(search.candidates) // machine()["cores"])
            total += counts(end=1, compile=rounds * (1 + gate.EXAMPLES), correct=rounds * gate.EXAMPLES)
            for candidate in search.candidates:
                total += counts(compile=1)  # by the one process that times
                for sizes, _ in candidate.at:
                    total += timed(Case(impl.op, "tune", sizes), args.budget)
    return total


def of_model(words: Sequence[str], plan: Sequence[Step]) -> Counter[str]:
    args = model.parser().parse_args(words)
    cfg, weights = model_configs.load(args.model, args.layers).llm, args.weights.split(",")
    runners = len(weights) * (1 + (args.against == "hf"))
    size = step_cost.language(cfg, 1, 1, 0).bytes
    by_default = [name for phase in ("prefill", "decode") for name in configured("cuda", phase)]
    total = counts(start=1, compile=len(weights) * len(by_default), byte=(len(weights) + 4 * runners) * size)
    total["float64_flop"] = runners * step_cost.language(cfg, 1, model.GATE, 0).flops
    for step in steps_of_model(args.prompts, args.histories, args.batches, args.contexts):
        for new, history, turns in ((step.new, step.history, args.rounds + 1), (step.history, 0, 1)):
            if new:
                needed = step_cost.language(cfg, step.batch, new, history)
                eager = unit("layer_step") * cfg.num_hidden_layers
                each = max(eager, call_seconds(needed.flops, needed.bytes))
                total["second"] += runners * turns * each  # pyright: ignore[reportArgumentType]
    return total


def of_error(words: Sequence[str], plan: Sequence[Step]) -> Counter[str]:
    args = accuracy.parser().parse_args(words)
    _, sizes = accuracy.sizes_of(args.op, args.toy)
    calls = [(impl, impl.configs[0], at) for impl in OPS[args.op].impls.values() for at in sizes]
    return counts(start=1, compile=kernels(calls), float64_call=2 * len(sizes), correct=len(calls))


def of_correctness(words: Sequence[str], plan: Sequence[Step]) -> Counter[str]:
    hands = min(machine()["cores"], int(words[words.index("--processes") + 1]))
    impls = [impl for op in OPS.values() for impl in op.impls.values()]
    rounds = VARIETIES / hands
    return counts(start=2.0, compile=rounds * sum(map(holds_kernels, impls)), correct=rounds * len(impls))


def of_pictures(words: Sequence[str], plan: Sequence[Step]) -> Counter[str]:
    """A roofline, of each op that is timed the times and the ratios, and one of the model."""
    drawn = {op for step in plan if step.words[0] == "bench.ops" for op in ops.parser().parse_args(step.words[1:]).ops}
    return counts(start=1, picture=2 + 2 * len(drawn))


COUNTS: dict[str, Callable[[Sequence[str], Sequence[Step]], Counter[str]]] = {
    "bench.correctness": of_correctness,
    "bench.ops": of_ops,
    "bench.goals": lambda words, plan: counts(start=1),
    "bench.model": of_model,
    "bench.tune": of_tune,
    "bench.accuracy": of_error,
    "bench.plot": of_pictures,
    "bench.report": of_pictures,
}
