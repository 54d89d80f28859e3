"""`vila-triton convert`: a checkpoint in one layout to a VILA folder in another."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vila_triton.console import bar
from vila_triton.limits import Limits

FORMS = ("ours", "awq-gemm", "awq-v1", "awq-v2", "dense")


def configure(commands: Any) -> None:
    about = "a VILA or LLaVA-1.5 checkpoint to a VILA folder, its int4 linears in another layout"
    parser = commands.add_parser("convert", help=about, description=f"Convert {about}; killed, it goes on from there.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    parser.add_argument("--format", choices=FORMS, default="ours", help="dense: int4 weights written out (ours)")
    writing(parser)
    parser.set_defaults(run=run)


def writing(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that writes a checkpoint."""
    parser.add_argument(
        "--shard-size", type=Limits(float, 1e-9, 1e6), default=5.0, metavar="GB", help="of a file, at most (5)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the sizes, write nothing")


def run(args: argparse.Namespace) -> None:
    from vila_triton.checkpoints import size_report
    from vila_triton.checkpoints.loading import open_source, require_fits
    from vila_triton.checkpoints.writing import write

    source = open_source(args.source)
    print(require_fits(source).report())
    for line in size_report.lines(source, args.format):
        print(line)
    if not args.dry_run:
        write(source, args.target, args.format, limit=limit(args), progress=progress())
        print(f"{args.target}: written")


def limit(args: argparse.Namespace) -> int:
    """Bytes of a shard."""
    return round(args.shard_size * 1e9)


def progress() -> Callable[[int, int], None]:
    """Says on a terminal, about twice a second, how far it is."""
    from vila_triton.checkpoints.size_report import size

    begun = last = time.monotonic()
    first: list[int] = []

    def say(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        first.append(done) if not first else None
        if now - last > 0.5 or done == total:
            last, speed = now, (done - first[0]) / max(now - begun, 1e-9)
            left = f", {(total - done) / speed:.0f} s left" if speed and done < total else ""
            bar(f"{size(done)} of {size(total)}{left}", done == total)

    return say
