"""Times every implementation of an op: `python -m bench.ops int4_matmul --case decode`

First the peak rates of this machine are measured. Then every case and implementation is gated and, if its numbers are
right, timed: median and spread with a cold cache, the same again to show the noise, and the rates as shares of the
peaks. On a CPU Triton kernels are only interpreted: they are gated there and get no time; references and variants of
libraries do.

With a cold cache no call exceeds the peak rates by more than the noise: such a figure is no time but an error, and the
exit code is 1 then.

--default times the implementation and config that a call runs by default at the sizes of a case, and marks its rows;
with --impl, those beside it. --gate case checks the numbers of the case alone, for a run after `pytest` and bench.tune.
A peer named by --skip-gate is timed whatever its numbers are, and its rows say so.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

from vila_triton.arguments import OldOption
from vila_triton.device import pick_device
from vila_triton.limits import POSITIVE
from vila_triton.ops.dtypes import DTYPES
from vila_triton.registry import OPS, REFERENCE, Impl
from vila_triton.registry.interpreter import uses_triton_kernels
from vila_triton.registry.size_ranges import implementation_at
from vila_triton.registry.target_configs import current_target
from vila_triton.registry.tuned_tables import default_choices_for, gpu_name, tuned_config_at

from ._tool import kernels_option, tool
from .correctness.failure_report import refusal_reason, release_memory
from .correctness.gate import case_error_gate, gate
from .measure import rows
from .measure.cases import Case, cases, op_names, random_arguments
from .measure.format import format_config, format_seconds
from .measure.timing import MachinePeaks, Timing, measure_peaks, time_call

Gate = Callable[[Impl, Mapping[str, Any], Case], str | None]
GATES: dict[str, Gate] = {"full": gate, "case": case_error_gate}
IMPOSSIBLE = "impossible"
CPU_FLOPS = 2 * 10**9  # a case with more is left out on a CPU unless it is asked for by name


def mean_cost(case: Case, args: Sequence[Any]) -> tuple[float, float]:
    """Returns (FLOPs, bytes moved at least once) of a call. Where sequences are of any length up to t, their mean
    counts.
    """
    parameters = inspect.signature(OPS[case.op].reference).parameters
    seq_lens = dict(zip(parameters, args)).get("seq_lens")
    if seq_lens is None:
        return case.cost
    return OPS[case.op].cost(**{**case.sizes, "t": seq_lens.double().mean().item()})


def rates(cost: tuple[float, float], case: Case, timing: Timing, peaks: MachinePeaks) -> dict[str, float]:
    """Returns the FLOPs and bytes of one call, and the rates as shares of the peaks."""
    flops, size = cost
    peak_flops = peaks.flops[case.sizes.get("dtype", "float32")]
    return {
        "flops": flops,
        "bytes": size,
        "flops_share": flops / timing.seconds / peak_flops,
        "bytes_share": size / timing.seconds / peaks.bandwidth,
    }


def impossible_reason(row: Mapping[str, Any], peaks: MachinePeaks) -> str | None:
    """Returns the reason why a time cannot be that of the whole work, or None: with a cold cache its rate exceeds a
    peak by more than the noise. The highest rate of any dtype counts, since half precision may be computed in float32.
    """
    if not row["cold"]:
        return None
    peak_flops = max(peaks.flops.values())
    shares = {
        f"the bandwidth of {peaks.bandwidth / 1e9:.1f} GB/s": row["bytes"] / row["seconds"] / peaks.bandwidth,
        f"the product's {peak_flops / 1e12:.3g} TFLOP/s": row["flops"] / row["seconds"] / peak_flops,
    }
    exceeded = [f"{share:.0%} of {name}" for name, share in shares.items() if share > 1 + row["noise"]]
    return (
        f"{IMPOSSIBLE}: {' and '.join(exceeded)} with a cold cache, so not all was computed or read"
        if exceeded
        else None
    )


def is_peer(impl: Impl) -> bool:
    """Returns whether an implementation is another library's."""
    return impl.fn.__module__.startswith("bench.peers")


def default_impl(case: Case, device: torch.device) -> tuple[str, Mapping[str, Any]]:
    """Returns the implementation and the config that a call of these sizes runs by default."""
    op = OPS[case.op]
    choice = default_choices_for(device, "decode").get(op.name, REFERENCE)
    name = choice if isinstance(choice, str) else implementation_at(choice, case.sizes[op.dynamic_sizes[0]], case.sizes)
    table = gpu_name(device)
    tuned = tuned_config_at(op.impls[name], table, tuple(case.sizes.items())) if table else None
    return name, tuned if tuned is not None else op.impls[name].default_config(current_target(), first_size(case))


def first_size(case: Case) -> int:
    """Returns the size of a case that differs from call to call, or 1 if none does."""
    names = OPS[case.op].dynamic_sizes
    return case.sizes[names[0]] if names else 1


def select_impls(
    case: Case, impls: Sequence[str], all_configs: bool, default: tuple | None
) -> Iterator[tuple[Impl, Any]]:
    """Yields implementations and configs to time: those named, or all; the default one comes first."""
    if default:
        yield OPS[case.op].impls[default[0]], default[1]
    for impl in OPS[case.op].impls.values():
        if impl.name in impls or not (impls or default):
            for config in impl.configs if all_configs else [impl.default_config(current_target(), first_size(case))]:
                if (impl.name, config) != default:
                    yield impl, config


def time_impl(
    impl: Impl, config: Mapping[str, Any], case: Case, device: torch.device, budget: float, check: Gate = gate
) -> tuple[Timing, tuple[float, float]] | str:
    """Returns the time of a call and its cost, or the reason why it gets none."""
    if reason := check(impl, config, case):
        return reason
    if device.type == "cpu" and (uses_triton_kernels(impl) or (is_peer(impl) and impl.name != "dense")):
        return "the gate is green, but a time in the interpreter says nothing"
    try:
        args = random_arguments(case, device)
        return time_call(lambda *args: impl(*args, config=config), args, device, budget), mean_cost(case, args)
    except Exception as error:  # whatever is wrong with one, memory that is not there included, the others go on
        return refusal_reason(error)


def time_cases(
    selected: Sequence[Case],
    impls: Sequence[str],
    all_configs: bool,
    device: torch.device,
    peaks: MachinePeaks,
    budget: float,
    check: Gate = gate,
    include_default: bool = False,
    skip_gate: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yields a row for every case, implementation and config (the first, or all) as soon as it is known."""
    stamp = rows.stamp(device)
    for case in selected:
        default = default_impl(case, device) if include_default else None
        for number, (impl, config) in enumerate(select_impls(case, impls, all_configs, default)):
            labels = {"op": case.op, "impl": impl.name, "case": case.name, "sizes": dict(case.sizes)}
            gated = not (is_peer(impl) and impl.name in skip_gate)
            labels |= {"config": dict(config), "served": include_default and not number, "gated": gated}
            result = time_impl(impl, config, case, device, budget, check if gated else lambda *_: None)
            if isinstance(result, str):
                yield {"kind": "refused", **labels, "reason": result, **stamp}
                release_memory(device)
            else:
                timing, cost = result
                extra = {"noise": timing.noise, "peer": is_peer(impl)}
                row = {"kind": "op", **labels, **asdict(timing), **extra, **rates(cost, case, timing, peaks), **stamp}
                reason = impossible_reason(row, peaks)
                yield {"kind": "refused", **labels, "reason": reason, **stamp} if reason else row


HEAD = f"{'':36}{'time':>11}{'spread':>8}{'noise':>7}{'GB/s':>9}{'share':>7}{'TFLOP/s':>10}{'share':>7}  x ref"


def format_row(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    """Returns one line of the table."""
    name = f"{'* ' if row['served'] else '  '}{row['impl']} {format_config(row['config'])}"
    if row["kind"] == "refused":
        return f"{name:36.36}  no time: {row['reason']}"
    seconds = row["seconds"]
    speedup = f"{reference['seconds'] / seconds:6.2f}" if reference else f"{'-':>6}"
    spread = (row["high"] - row["low"]) / seconds
    marks = (
        ("" if row["gated"] else "  not gated")
        + ("" if row["cold"] else "  cache warm")
        + ("  no graph" if torch.cuda.is_available() and not row["graph"] else "")
    )
    return (
        f"{name:36.36}{format_seconds(seconds)}{spread:8.1%}{row['noise']:7.1%}{row['bytes'] / seconds / 1e9:9.1f}"
        f"{row['bytes_share']:7.1%}{row['flops'] / seconds / 1e12:10.3g}{row['flops_share']:7.1%}{speedup}{marks}"
    )


def select_cases(ops: Sequence[str], case_name: str | None, dtype: str, device: torch.device) -> list[Case]:
    """Returns the cases to run; those too large for a CPU are left out with a note unless they are named."""
    candidates = [case for op in ops for case in cases(op, case_name)]
    candidates = [replace(c, sizes={**c.sizes, "dtype": dtype}) if "dtype" in c.sizes else c for c in candidates]
    fits = [c for c in candidates if case_name or device.type == "cuda" or c.cost[0] <= CPU_FLOPS]
    if len(fits) < len(candidates):
        count = len(candidates) - len(fits)
        print(f"left out on a CPU: {count} cases of more than {CPU_FLOPS:.0e} flops; --case runs them")
    return fits


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line of `python -m bench.ops`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all")
    parser.add_argument("--impl", action="append", default=[], help="only this implementation (may be repeated)")
    parser.add_argument("--case", help="a name of configs/bench/OP.toml; default: all")
    parser.add_argument("--configs", choices=("first", "all"), default="first")
    parser.add_argument("--dtype", choices=DTYPES.values, help="default: float16 on a GPU, float32 on a CPU")
    default = parser.add_argument("--default", action="store_true", help="what runs by default, and what --impl names")
    parser.add_argument("--served", action=OldOption, new=default)
    parser.add_argument("--gate", choices=GATES, default="full", help="case: only the numbers of the case itself")
    help_text = "timed whatever its numbers are; may be repeated"
    skip_gate = parser.add_argument("--skip-gate", action="append", default=[], metavar="PEER", help=help_text)
    parser.add_argument("--ungated", action=OldOption, new=skip_gate)
    parser.add_argument("--peers", action="store_true", help="other libraries' kernels too, where installed")
    parser.add_argument("--budget", type=POSITIVE, default=0.2, help="seconds for each of the two runs of a figure")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    parser.add_argument("--device")
    return parser


@tool
def main() -> int:
    args = parser().parse_args()
    device = pick_device(args.device)
    all_ops = op_names()
    from .peers import dense, discover_peers, peer_names, sdpa  # noqa: F401 (dense, sdpa: torch itself, always there)

    if args.peers:
        for peer, reason in discover_peers().items():
            print(f"peer {peer}: not here: {reason}")
    dtype = args.dtype or ("float16" if device.type == "cuda" else "float32")
    selected = select_cases(args.ops or all_ops, args.case, dtype, device)
    available = {name for case in selected for name in OPS[case.op].impls}
    if unknown := set(args.impl) - available - ({*peer_names(), "gemlite_float32"} if args.peers else set()):
        raise ValueError(f"no implementation {', '.join(sorted(unknown))}; there are: {', '.join(sorted(available))}")
    return int(run_and_print(selected, args, device))


def run_and_print(selected: Sequence[Case], args: argparse.Namespace, device: torch.device) -> bool:
    """Measures, prints and writes; returns whether a figure was impossible."""
    dtypes = sorted({case.sizes.get("dtype", "float32") for case in selected})
    peaks, stamp = measure_peaks(device, dtypes), rows.stamp(device)
    products = ", ".join(f"{name} {flops / 1e12:.3g} TFLOP/s" for name, flops in peaks.flops.items())
    print(
        f"{stamp['device']} | torch {stamp['torch']} | triton {stamp['triton']} | {stamp['commit']} | {stamp['date']}"
    )
    print(f"ceilings, measured now: {peaks.bandwidth / 1e9:.1f} GB/s, {products}\n{HEAD}")
    if args.out:
        rows.write(args.out, [{"kind": "ceiling", **asdict(peaks), **stamp}])
    last, reference, any_impossible = None, None, False
    for number, case in enumerate(selected, 1):
        all_configs, check = args.configs == "all", GATES[args.gate]
        for row in time_cases(
            [case], args.impl, all_configs, device, peaks, args.budget, check, args.default, args.skip_gate
        ):
            if last is not case:
                print(f"{case}   [{number} of {len(selected)}]")
                last, reference = case, None
            if row["kind"] == "op" and row["impl"] == REFERENCE:
                reference = row
            print(format_row(row, reference), flush=True)
            any_impossible |= row.get("reason", "").startswith(IMPOSSIBLE)
            if args.out:
                rows.write(args.out, [row])
    return any_impossible


if __name__ == "__main__":
    sys.exit(main())
