"""Is a kernel right? `python -m bench.check int4_matmul --impl packed`

Random examples of the op in guarded memory, aligned or with odd strides, against the computed error budget, for every
implementation but the reference and every config. A failure is shrunk to its simplest case, shown with a map of its
errors, and saved as a bundle; `--replay FILE` makes that very call again, on the kernel as it is now. Without a GPU
kernels run in Triton's interpreter, which has no bfloat16. Exit code: 0 nothing is wrong, 1 something is, 2 the
command itself.
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

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

from vila_triton.limits import COUNT, MANY, POSITIVE
from vila_triton.registry import OPS, REFERENCE, Impl, Op, Unsupported, discover, there
from vila_triton.registry.interpreter import holds_kernels

from ._tool import tool
from .correctness import repro_bundle
from .correctness.error_budget import DEVICE, Example, arguments
from .correctness.failure_report import described, elements, line, settings
from .correctness.find_failure import DeviceLost, Verdict, search
from .correctness.tile_coverage import coverage

Pair = tuple[Impl, int]  # an implementation and the number of one of its configs


def chosen(op: str, impl: str | None, config: int | None) -> list[Pair]:
    """What is to be checked. Errors: ValueError naming the choices."""
    discover()
    if op not in OPS:
        raise ValueError(f"no op {op!r}; there are: {there(OPS)}")
    every = OPS[op].impls
    if impl is not None and impl not in every:
        raise ValueError(f"{op} has no implementation {impl!r}; there are: {there(every)}")
    impls = [every[impl]] if impl else [x for x in every.values() if x.name != REFERENCE]
    pairs = [(x, i) for x in impls for i in range(len(x.configs)) if config in (None, i)]
    if impls and not pairs:
        raise ValueError(f"no config {config}: {', '.join(f'{x.name} has {len(x.configs)}, from 0' for x in impls)}")
    if not pairs:
        raise ValueError(f"{op} has only its reference, which --impl {REFERENCE} checks")
    return pairs


def check(pairs: Sequence[Pair], examples: int, seconds: float, out: Path) -> bool:
    """Check each and print how it went; whether nothing is wrong."""
    verdicts: list[Verdict] = []
    start, shrinking = time.monotonic(), 0.0
    for impl, number in pairs:
        op, config = OPS[impl.op], impl.configs[number]
        share = (start + seconds + shrinking - time.monotonic()) / (len(pairs) - len(verdicts))
        print(f"{op.name} {impl.name}, config {number}: {settings(config)}", flush=True)
        try:
            verdict = search(op, impl, config, examples, share)
        except DeviceLost as lost:
            print(f"{line('wrong')}crashed, and the GPU with it: nothing can be shrunk, nor checked after it: {lost}")
            return False
        shrinking += max(0.0, verdict.seconds - share) if verdict.shrunk else 0.0
        file = out / f"{op.name}-{impl.name}-{number}.bundle"
        before = [v for (other, _), v in zip(pairs, verdicts) if other is impl]
        for text in outcome(op, impl, number, verdict, before, file):
            print(text, flush=True)
        verdicts.append(verdict)
    wrong, idle = sum(bool(v.shrunk) for v in verdicts), sum(not v.examples for v in verdicts)
    print(f"{len(verdicts) - wrong - idle} right, {wrong} wrong, {idle} unsupported here")
    return not wrong


def outcome(op: Op, impl: Impl, number: int, verdict: Verdict, before: Sequence[Verdict], file: Path) -> Iterator[str]:
    """The verdict in lines; a failure is saved first, and not described again if a config `before` failed alike."""
    spent = f"{verdict.examples} examples in {verdict.seconds:.1f} s"
    shrunk, largest, config = verdict.shrunk, verdict.largest, impl.configs[number]
    if not verdict.examples:
        yield f"{line('unsupported')}{'; '.join(sorted(verdict.reasons))}"
    elif not shrunk or not largest:
        yield f"{line('right')}{spent}"
        for text, head in zip(coverage(config, verdict.calls), chain(["covered"], repeat(""))):
            yield f"{line(head)}{text}"
    else:
        sizes = dict(shrunk.sizes)
        args, seed = arguments(op, **sizes), sizes.pop("seed")
        file = repro_bundle.unused(file)
        repro_bundle.save(file, impl, config, args, seed, shrunk.layout, sizes, "bench.check")
        yield f"{line('wrong')}{shrunk.kind}; {spent}"
        yield f"{line('shrunk case')}{settings(shrunk.sizes)}{verdict.caveat and f'  ({verdict.caveat})'}"
        yield f"{line('layout')}its arguments were {shrunk.layout}"
        alike = (shrunk.kind, shrunk.sizes, shrunk.layout)
        if not any(v.shrunk and (v.shrunk.kind, v.shrunk.sizes, v.shrunk.layout) == alike for v in before):
            yield from described(shrunk.error, impl, config)
            if largest.elements > shrunk.elements:
                yield f"{line('larger case')}{settings(largest.sizes)}"
                yield from elements(largest.error, config)
        yield f"{line('bundle')}python -m bench.check --replay {file}"


def replay(file: Path) -> bool:
    """Make the call of a bundle again and print how it went; whether it is right. Errors: `BundleError`, OSError."""
    saved = repro_bundle.load(file)
    op, impl = repro_bundle.resolve(saved)
    print(f"{op.name} {impl.name}: {settings(saved.config)}")
    print(f"{line('call')}{settings({**saved.sizes, 'seed': saved.seed})}, {saved.layout}, from {saved.origin}")
    print(f"{line('saved with')}{settings(saved.stamp)}")
    try:
        sizes = saved.sizes if set(saved.sizes) == set(op.domain) else None
        held = Example(op, saved.args, saved.seed, sizes)
        held.check(impl, saved.config, saved.layout, held.twice)
    except Unsupported as reason:
        print(f"{line('unsupported')}{reason}")
        return False
    except Exception as error:  # a kernel may fail in any way at all
        print("\n".join(described(error, impl, saved.config)))
        return False
    print(f"{line('right')}the call is faithful now")
    return True


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="?", metavar="OP")
    parser.add_argument("--impl", metavar="NAME", help="only this implementation; default: all but the reference")
    parser.add_argument("--config", type=MANY, metavar="N", help="only the config of this number, counted from 0")
    parser.add_argument("--examples", type=COUNT, default=100, help="for each config, at most (default: %(default)s)")
    parser.add_argument("--seconds", type=POSITIVE, default=45, help="for all, but for shrinking (%(default)s)")
    parser.add_argument("--peers", action="store_true", help="other libraries' kernels too, where installed")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="folder for bundles")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="make the call of this bundle again")
    args = parser.parse_args(argv)
    how = "interpreted (no GPU)" if DEVICE == "cpu" else f"compiled for {torch.cuda.get_device_name()}"
    if args.peers:
        from .peers import discover as find_peers

        for peer, reason in find_peers().items():
            print(f"peer {peer}: not here: {reason}")
    if (args.op is None) == (args.replay is None):
        raise ValueError("expected an OP to check or a bundle to --replay, and not both")
    pairs = [] if args.replay else chosen(args.op, args.impl, args.config)
    if not pairs or any(holds_kernels(impl) for impl, _ in pairs):
        print(f"Triton kernels run {how}")
    right = replay(args.replay) if args.replay else check(pairs, args.examples, args.seconds, args.out)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
