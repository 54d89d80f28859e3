"""`vila-triton convert`: a checkpoint in one layout to a VILA folder in another."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vila_triton.console import print_progress
from vila_triton.limits import Limits

FORMATS = ("ours", "awq-gemm", "awq-v1", "awq-v2", "dense")


def configure(commands: Any) -> None:
    summary = "a VILA or LLaVA-1.5 checkpoint to a VILA folder, its int4 linears in another layout"
    parser = commands.add_parser(
        "convert", help=summary, description=f"Convert {summary}; killed, it goes on from there."
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    parser.add_argument("--format", choices=FORMATS, default="ours", help="dense: int4 weights written out (ours)")
    add_writing_arguments(parser)
    parser.set_defaults(run=run)


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that writes a checkpoint."""
    parser.add_argument(
        "--shard-size", type=Limits(float, 1e-9, 1e6), default=5.0, metavar="GB", help="of a file, at most (5)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the sizes, write nothing")


def run(args: argparse.Namespace) -> None:
    from vila_triton.checkpoints import size_report
    from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
    from vila_triton.checkpoints.writing import write_checkpoint

    source = open_checkpoint(args.source)
    print(check_checkpoint(source).describe())
    for line in size_report.size_table(source, args.format):
        print(line)
    if not args.dry_run:
        write_checkpoint(source, args.target, args.format, max_shard_bytes=shard_bytes(args), progress=byte_progress())
        print(f"{args.target}: written")


def shard_bytes(args: argparse.Namespace) -> int:
    """Bytes of a shard."""
    return round(args.shard_size * 1e9)


def byte_progress() -> Callable[[int, int], None]:
    """Says on a terminal, about twice a second, how far it is."""
    from vila_triton.checkpoints.size_report import format_bytes

    start_time = last_shown = time.monotonic()
    first_done: list[int] = []

    def show(done: int, total: int) -> None:
        nonlocal last_shown
        now = time.monotonic()
        first_done.append(done) if not first_done else None
        if now - last_shown > 0.5 or done == total:
            last_shown, speed = now, (done - first_done[0]) / max(now - start_time, 1e-9)
            remaining = f", {(total - done) / speed:.0f} s left" if speed and done < total else ""
            print_progress(f"{format_bytes(done)} of {format_bytes(total)}{remaining}", done == total)

    return show
