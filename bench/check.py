"""Check the kernels of one op on examples: `python -m bench.check int4_matmul --impl packed`

Every implementation but the reference, and every config of it, runs in guarded memory, aligned or with odd strides, and
is compared with the reference within the computed error budget: at sizes just before, at and just past its tiles, on
random and on hard values (see `correctness.example_plan`). What was covered is kept, and the next run of an unchanged
kernel goes on with other examples. A failure is shrunk to its simplest case, shown with a map of its errors, and saved
as a repro bundle; `--replay FILE` makes the same call again, on the kernel as it is now. Without a GPU kernels run in
Triton's interpreter, which has no bfloat16; with `--compiled sm_80`, what the compiler makes of them for that GPU runs
in `bench.emulator`, in all dtypes, and is watched for races, stray accesses and missing waits. Exit code: 0 nothing is
wrong, 1 something is wrong, 2 the command failed.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path

import torch

if __name__ == "__main__" and not (torch.cuda.is_available() or any(x.startswith("--compiled") for x in sys.argv)):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

from vila_triton.limits import COUNT, COUNT_OR_ZERO, POSITIVE
from vila_triton.registry import OPS, REFERENCE, Impl, Op, Unsupported, describe_available, discover
from vila_triton.registry.interpreter import uses_triton_kernels

from ._tool import kernels_option, tool
from .correctness import repro_bundle
from .correctness.compiled_calls import RUNS_COMPILED, compiled_for, repeat_compiled
from .correctness.error_budget import DEVICE, Example, example_args
from .correctness.failure_report import describe_elements, describe_failure, format_settings, label
from .correctness.find_failure import DeviceLost, SearchResult, find_failure
from .correctness.kept_coverage import coverage_file, load_coverage, save_coverage
from .emulator.compile import EMULATED_TARGETS

RUNS_TO_COVER = 4  # then every edge is sought again
ImplConfig = tuple[Impl, int]  # an implementation and the number of one of its configs


def select_pairs(op: str, impl: str | None, config: int | None, compiled: bool = False) -> list[ImplConfig]:
    """The configs to check, `compiled`: of Triton kernels. Errors: ValueError naming the choices."""
    discover()
    if op not in OPS:
        raise ValueError(f"no op {op!r}; there are: {describe_available(OPS)}")
    available = {name: x for name, x in OPS[op].impls.items() if uses_triton_kernels(x) or not compiled}
    if impl is not None and impl not in available:
        kind = "implementation with Triton kernels" if compiled else "implementation"
        raise ValueError(f"{op} has no {kind} {impl!r}; there are: {describe_available(available)}")
    impls = [available[impl]] if impl else [x for x in available.values() if x.name != REFERENCE]
    pairs = [(x, i) for x in impls for i in range(len(x.configs)) if config in (None, i)]
    if impls and not pairs:
        raise ValueError(f"no config {config}: {', '.join(f'{x.name} has {len(x.configs)}, from 0' for x in impls)}")
    if not pairs:
        raise ValueError(f"{op} has only its reference, which --impl {REFERENCE} checks")
    return pairs


def check_pairs(
    pairs: Sequence[ImplConfig], examples: int, seconds: float, out: Path, target: str | None = None
) -> bool:
    """Check each config, compiled for a target if there is one, and print the results; True if nothing is wrong."""
    verdicts: list[SearchResult] = []
    start, shrinking = time.monotonic(), 0.0
    for impl, number in pairs:
        op, config = OPS[impl.op], impl.configs[number]
        seconds_each = (start + seconds + shrinking - time.monotonic()) / (len(pairs) - len(verdicts))
        print(f"{op.name} {impl.name}, config {number}: {format_settings(config)}", flush=True)
        kept_file = coverage_file(impl, config, target)
        runs, covered = load_coverage(kept_file)
        if runs % RUNS_TO_COVER == 0:  # an edge was seen with few other values
            covered.edges.clear()
        try:
            verdict = find_failure(op, impl, config, examples, seconds_each, runs, covered, target)
        except DeviceLost as lost:
            print(f"{label('wrong')}crashed, and the GPU with it: nothing can be shrunk, nor checked after it: {lost}")
            return False
        shrinking += max(0.0, verdict.seconds - seconds_each) if verdict.simplest else 0.0
        if verdict.num_examples and not verdict.simplest:
            save_coverage(kept_file, runs + 1, verdict.coverage)
        file = out / f"{'-'.join(filter(None, (op.name, impl.name, str(number), target)))}.bundle"
        earlier = [v for (other, _), v in zip(pairs, verdicts) if other is impl]
        for text in outcome_lines(op, impl, number, verdict, runs, earlier, file, target):
            print(text, flush=True)
        verdicts.append(verdict)
    wrong, unsupported = sum(bool(v.simplest) for v in verdicts), sum(not v.num_examples for v in verdicts)
    print(f"{len(verdicts) - wrong - unsupported} right, {wrong} wrong, {unsupported} unsupported here")
    return not wrong


def outcome_lines(
    op: Op,
    impl: Impl,
    number: int,
    verdict: SearchResult,
    runs: int,
    earlier: Sequence[SearchResult],
    file: Path,
    target: str | None = None,
) -> Iterator[str]:
    """The result in lines, after so many `runs` whose coverage was kept.

    A failure is saved first; it is not described again if an `earlier` config failed alike.
    """
    effort = f"{verdict.num_examples} examples in {verdict.seconds:.1f} s"
    shrunk, largest, config = verdict.simplest, verdict.largest, impl.configs[number]
    if not verdict.num_examples:
        yield f"{label('unsupported')}{'; '.join(sorted(verdict.reasons))}"
    elif not shrunk or not largest:
        earlier_runs = f", after {runs} earlier run{'s' * (runs > 1)}" if runs else ""
        yield f"{label('right')}{effort}{earlier_runs}"
        for text, head in zip(verdict.coverage.lines(config), chain(["covered"], repeat(""))):
            yield f"{label(head)}{text}"
    else:
        sizes = dict(shrunk.sizes)
        args, seed = example_args(op, **sizes), sizes.pop("seed")
        file = repro_bundle.unused_path(file)
        repro_bundle.save(file, impl, config, args, seed, shrunk.layout, sizes, "bench.check", target or "")
        yield f"{label('wrong')}{shrunk.kind}; {effort}"
        yield f"{label('shrunk case')}{format_settings(shrunk.sizes)}{verdict.caveat and f'  ({verdict.caveat})'}"
        yield f"{label('layout')}its arguments were {shrunk.layout}"
        signature = (shrunk.kind, shrunk.sizes, shrunk.layout)
        if not any(v.simplest and (v.simplest.kind, v.simplest.sizes, v.simplest.layout) == signature for v in earlier):
            yield from describe_failure(shrunk.error, impl, config)
            if largest.num_elements > shrunk.num_elements:
                yield f"{label('larger case')}{format_settings(largest.sizes)}"
                yield from describe_elements(largest.error, config)
        yield f"{label('bundle')}python -m bench.check --replay {file}"


def replay(file: Path, target: str | None = None) -> bool:
    """Make the call of a bundle again, compiled for a target if one is given, and print the result.

    Returns True if it is right. Errors: BundleError, OSError.
    """
    saved = repro_bundle.load(file)
    op, impl = repro_bundle.resolve(saved)
    print(f"{op.name} {impl.name}: {format_settings(saved.config)}")
    print(f"{label('call')}{format_settings({**saved.sizes, 'seed': saved.seed})}, {saved.layout}, from {saved.origin}")
    print(f"{label('saved with')}{format_settings(saved.stamp)}")
    try:
        sizes = saved.sizes if set(saved.sizes) - {"values"} == set(op.domain) else None
        example = Example(op, saved.args, saved.seed, sizes)
        with compiled_for(target, impl, saved.config):
            example.check(impl, saved.config, saved.layout, example.call_twice)
    except Unsupported as reason:
        print(f"{label('unsupported')}{reason}")
        return False
    except Exception as error:  # a kernel may fail in any way at all
        print("\n".join(describe_failure(error, impl, saved.config)))
        return False
    print(f"{label('right')}the call matches the reference now")
    return True


def mode(target: str | None) -> str:
    """The way Triton kernels run here, in words."""
    if target:
        return f"compiled for {target}, emulated"
    return "interpreted (no GPU)" if DEVICE == "cpu" else f"compiled for {torch.cuda.get_device_name()}"


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("op", nargs="?", metavar="OP")
    parser.add_argument("--impl", metavar="NAME", help="only this implementation; default: all but the reference")
    parser.add_argument(
        "--config", type=COUNT_OR_ZERO, metavar="N", help="only the config of this number, counted from 0"
    )
    parser.add_argument("--examples", type=COUNT, default=100, help="for each config, at most (default: %(default)s)")
    parser.add_argument("--seconds", type=POSITIVE, default=45, help="for all, but for shrinking (%(default)s)")
    parser.add_argument("--compiled", choices=EMULATED_TARGETS, help="run what is compiled for this GPU, without one")
    parser.add_argument("--peers", action="store_true", help="other libraries' kernels too, where installed")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="folder for bundles")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="make the call of this bundle again")
    args = parser.parse_args(argv)
    if DEVICE == "cpu":
        torch.set_num_threads(1)  # examples are small: a second thread costs more than it gives
    target = args.compiled or (repro_bundle.load(args.replay).target or None if args.replay else None)
    if target and not RUNS_COMPILED:
        words = sys.argv[1:] if argv is None else argv
        return repeat_compiled("bench.check", words, target)
    if args.peers:
        from .peers import discover_peers

        for peer, reason in discover_peers().items():
            print(f"peer {peer}: not here: {reason}")
    if (args.op is None) == (args.replay is None):
        raise ValueError("expected an OP to check or a bundle to --replay, and not both")
    pairs = [] if args.replay else select_pairs(args.op, args.impl, args.config, bool(target))
    if not pairs or any(uses_triton_kernels(impl) for impl, _ in pairs):
        print(f"Triton kernels run {mode(target)}")
    if args.replay:
        passed = replay(args.replay, target)
    else:
        passed = check_pairs(pairs, args.examples, args.seconds, args.out, target)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
