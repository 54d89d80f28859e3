"""Estimates the seconds that the steps of `bench.suite` take on a GPU, before there is one: counts times units.

Counts come from the steps' own command lines, read by the parsers of the commands: the cases, the implementations that
are registered, the candidates that the cost model ranks first. Units are those of configs/bench/suite.toml. A time
budget counts as that many seconds, in the unit `second`; a call takes the time that datasheets allow, times the unit
`slack`. Work that several processes do at once counts once per round.
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

from vila_triton.hashing import canonical_json
from vila_triton.paths import config_dir
from vila_triton.registry import OPS, REFERENCE, Impl
from vila_triton.registry.interpreter import uses_triton_kernels
from vila_triton.registry.kernel_config import configured_choices
from vila_triton.registry.size_ranges import implementation_at
from vila_triton.registry.target_configs import current_target

from . import accuracy, model, ops, tune
from .correctness import gate
from .correctness.error_budget import error_budget
from .measure import model_configs, step_cost
from .measure.cases import Case, cases
from .measure.model_steps import plan_steps as steps_of_model
from .measure.suite_plan import SuiteStep, allot_seconds
from .measure.timing import num_copies
from .tuner import cost_model
from .tuner.jobs import compile_equivalent_sizes
from .tuner.search import Search, SearchPlan

KernelCall = tuple[Impl, Mapping[str, Any], Mapping[str, Any]]  # implementation, config, sizes
ARCH = "sm_90"
CORRECTNESS_VARIANTS = 3 * 2  # dtypes and layouts in which bench.correctness runs a config
SEARCH_STAGES = 3  # of a search, each with processes of its own


@cache
def suite_config() -> Mapping[str, Any]:
    """Returns configs/bench/suite.toml."""
    return tomllib.loads((config_dir() / "bench" / "suite.toml").read_text())


@cache
def machine_config() -> Mapping[str, Any]:
    """Returns the figures of the machine that the estimate is for."""
    sheets = tomllib.loads((config_dir() / "bench" / "gpus.toml").read_text())
    return {**suite_config()["machine"], **sheets[suite_config()["machine"]["gpu"]]}


def unit_seconds(name: str) -> float:
    """Returns the seconds of a unit."""
    return 1.0 if name == "second" else suite_config()["units"][name]


def total_seconds(counts: Mapping[str, float]) -> float:
    """Returns the seconds of some counts."""
    return sum(unit_seconds(name) * count for name, count in counts.items())


def estimate_table(plan: Sequence[SuiteStep], limit: float) -> Iterator[str]:
    """Yields the estimate of each step that is kept, its limit and its breakdown, and the total."""
    limits = allot_seconds(plan, limit)
    included = [step for step in plan if step.name in limits]
    total = 0.0
    yield f"{'':24}{'estimate':>10}{'limit':>8}"
    for step in included:
        step_counts = count_step(step, limits[step.name], included)
        total += min(total_seconds(step_counts), limits[step.name])
        verdict = "  ends early, by its own clock" if step.has_own_clock else "  DOES NOT FIT"
        remark = "" if total_seconds(step_counts) <= limits[step.name] else verdict
        ordered = sorted(step_counts, key=lambda name: -unit_seconds(name) * step_counts[name])
        breakdown = ", ".join(
            f"{step_counts[name]:.4g} {name} {unit_seconds(name) * step_counts[name]:.1f} s" for name in ordered
        )
        yield f"{step.name:24}{total_seconds(step_counts):8.0f} s{limits[step.name]:6.0f} s  {breakdown}{remark}"
    yield f"{'together':24}{total:8.0f} s{sum(limits.values()):6.0f} s, of {limit:.0f} s"


def counts(**each: float) -> Counter[str]:
    """Returns counts by unit."""
    return Counter(each)  # pyright: ignore[reportArgumentType, reportReturnType]


def count_step(step: SuiteStep, limit: float, plan: Sequence[SuiteStep]) -> Counter[str]:
    """Returns the counts of a step, by unit."""
    name, *arguments = step.command(limit)
    return COUNTS[name](arguments, plan)


def num_kernels(calls: Sequence[KernelCall]) -> int:
    """Returns the number of kernels that the compiler makes for some calls."""
    return len(
        {
            (
                impl.op,
                impl.name,
                canonical_json(dict(config)),
                canonical_json(compile_equivalent_sizes(OPS[impl.op].domain, sizes)),
            )
            for impl, config, sizes in calls
            if uses_triton_kernels(impl)
        }
    )


@cache
def float64_calls_per_case() -> int:
    """Returns the references in float64 that the error budget of one case takes, counted at a small one."""
    op, calls = OPS["swiglu"], 0
    reference = op.reference

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += args[0].dtype == torch.float64
        return reference(*args)

    args = op.make_example(s=8, f=16, dtype="float32", rng=torch.Generator().manual_seed(0), device="cpu")
    with patch.object(op, "reference", counted):
        error_budget(op, args)
    return calls


def count_reference_checks(checked_cases: Sequence[Case]) -> Counter[str]:
    """Returns the counts of checking the numbers of those cases that are small enough for it."""
    flops = [
        c.cost[0]
        for c in checked_cases
        if c.cost[0] <= gate.CASE_FLOPS["cuda"] and c.cost[1] <= gate.CASE_BYTES["cuda"]
    ]
    return counts(
        float64_call=len(flops) * float64_calls_per_case(), float64_flop=sum(flops) * float64_calls_per_case()
    )


def predicted_call_seconds(flops: float, size: float) -> float:
    """Returns the seconds of a call by the datasheet, times the unit `slack`."""
    return unit_seconds("slack") * max(flops / machine_config()["flops"], size / machine_config()["bandwidth"])


def count_timing(case: Case, budget: float) -> Counter[str]:
    """Returns the counts of one time: arguments and copies, one turn over them to warm up, one that is captured, and
    two runs of five samples or more.
    """
    flops, size = case.cost
    copies, _ = num_copies(max(1, size), machine_config()["cache"])
    pass_seconds = copies * predicted_call_seconds(flops, size)
    return counts(
        figure=1,
        byte=size * copies,
        launch=2 * copies,
        second=2 * pass_seconds + 2 * max(budget, 5 * pass_seconds),
    )


def default_impl(case: Case) -> tuple[str, Mapping[str, Any]]:
    """Returns the implementation and config that a call runs by default on a GPU without a tuned table."""
    op = OPS[case.op]
    choice = configured_choices("cuda", "decode").get(case.op, REFERENCE)
    name = choice if isinstance(choice, str) else implementation_at(choice, case.sizes[op.dynamic_sizes[0]], case.sizes)
    return name, op.impls[name].default_config(current_target(), ops.first_size(case))


def count_ops(arguments: Sequence[str], plan: Sequence[SuiteStep]) -> Counter[str]:
    """Returns the counts of a `bench.ops`."""
    from .peers import dense, sdpa  # noqa: F401 (torch's own, which are sure to be there)

    args = ops.parser().parse_args(arguments)
    selected = [case for op in args.ops for case in cases(op, args.case)]
    total = counts(start=1) + count_reference_checks(selected)
    calls: list[KernelCall] = []
    for case in selected:
        default = default_impl(case) if args.default else None
        for impl, config in ops.select_impls(case, args.impl, args.configs == "all", default):
            calls.append((impl, config, case.sizes))
            total += count_timing(case, args.budget)
    total["compile"] = num_kernels(calls)
    if args.gate == "full":
        impls_by_name = {(impl.op, impl.name): impl for impl, _, _ in calls}
        total["correct"] = gate.NUM_EXAMPLES * len(impls_by_name)
        total["compile"] += gate.NUM_EXAMPLES * sum(map(uses_triton_kernels, impls_by_name.values()))
    return total


def count_tune(arguments: Sequence[str], plan: Sequence[SuiteStep]) -> Counter[str]:
    """Returns the counts of a `bench.tune`."""
    args = tune.parser().parse_args(arguments)
    total = counts(start=1 + SEARCH_STAGES)
    with tempfile.TemporaryDirectory() as folder:
        for impl in tune.select_impls(args):
            search_plan = SearchPlan("gpu", ARCH, cost_model.gpu_of_arch(ARCH), args.worse_than, args.budget, {})
            search = Search(impl, cases(impl.op, args.case), search_plan, Path(folder), args.candidates)
            rounds = -(-len(search.candidates) // machine_config()["cores"])
            total += counts(end=1, compile=rounds * (1 + gate.NUM_EXAMPLES), correct=rounds * gate.NUM_EXAMPLES)
            for candidate in search.candidates:
                total += counts(compile=1)  # by the one process that times
                for sizes, _ in candidate.timed_sizes:
                    total += count_timing(Case(impl.op, "tune", sizes), args.budget)
    return total


def count_model(arguments: Sequence[str], plan: Sequence[SuiteStep]) -> Counter[str]:
    """Returns the counts of a `bench.model`."""
    args = model.parser().parse_args(arguments)
    cfg, weights = model_configs.load_model(args.model, args.layers).llm, args.weights.split(",")
    runners = len(weights) * (1 + (args.baseline == "hf"))
    size = step_cost.language_cost(cfg, 1, 1, 0).bytes
    default_kernels = [name for phase in ("prefill", "decode") for name in configured_choices("cuda", phase)]
    num_forward = sum(not name.endswith("_backward") for name in default_kernels)  # nothing is trained
    total = counts(start=1, compile=len(weights) * num_forward, byte=(len(weights) + 4 * runners) * size)
    total["float64_flop"] = runners * step_cost.language_cost(cfg, 1, model.GATE_TOKENS, 0).flops
    for step in steps_of_model(args.prompts, args.histories, args.batches, args.contexts):
        for new, history, repeats in (
            (step.new_tokens, step.cached_tokens, args.rounds + 1),
            (step.cached_tokens, 0, 1),
        ):
            if new:
                cost = step_cost.language_cost(cfg, step.batch, new, history)
                eager = unit_seconds("layer_step") * cfg.num_hidden_layers
                step_seconds = max(eager, predicted_call_seconds(cost.flops, cost.bytes))
                total["second"] += runners * repeats * step_seconds  # pyright: ignore[reportArgumentType]
    return total


def count_error(arguments: Sequence[str], plan: Sequence[SuiteStep]) -> Counter[str]:
    """Returns the counts of a `bench.accuracy`."""
    args = accuracy.build_parser().parse_args(arguments)
    _, sizes = accuracy.yardstick_and_sizes(args.op, args.toy)
    calls = [(impl, impl.configs[0], case_sizes) for impl in OPS[args.op].impls.values() for case_sizes in sizes]
    return counts(start=1, compile=num_kernels(calls), float64_call=2 * len(sizes), correct=len(calls))


def count_correctness(arguments: Sequence[str], plan: Sequence[SuiteStep]) -> Counter[str]:
    """Returns the counts of a `bench.correctness`."""
    num_processes = min(machine_config()["cores"], int(arguments[arguments.index("--processes") + 1]))
    impls = [impl for op in OPS.values() for impl in op.impls.values()]
    rounds = CORRECTNESS_VARIANTS / num_processes
    return counts(start=2.0, compile=rounds * sum(map(uses_triton_kernels, impls)), correct=rounds * len(impls))


def count_plots(arguments: Sequence[str], plan: Sequence[SuiteStep]) -> Counter[str]:
    """Returns the counts of a `bench.plot`: a roofline, the times and ratios of each op that is timed,
    and the model.
    """
    plotted_ops = {
        op for step in plan if step.argv[0] == "bench.ops" for op in ops.parser().parse_args(step.argv[1:]).ops
    }
    return counts(start=1, plot=2 + 2 * len(plotted_ops))


COUNTS: dict[str, Callable[[Sequence[str], Sequence[SuiteStep]], Counter[str]]] = {
    "bench.correctness": count_correctness,
    "bench.ops": count_ops,
    "bench.goals": lambda words, plan: counts(start=1),
    "bench.model": count_model,
    "bench.tune": count_tune,
    "bench.accuracy": count_error,
    "bench.plot": count_plots,
    "bench.report": count_plots,
}
