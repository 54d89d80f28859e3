"""`vila-triton convert`: a checkpoint in one layout to a VILA folder in another."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vila_triton.arguments import add_command, renamed_values
from vila_triton.console import Progress
from vila_triton.limits import Limits

QUESTION = "How do I get the checkpoint that I want?"
SUMMARIES = {"convert": "write a VILA or LLaVA-1.5 checkpoint as a VILA folder, its int4 linears in another layout"}
FORMATS = ("vila-triton", "awq-gemm", "awq-v1", "awq-v2", "dense")


def configure(commands: Any) -> None:
    """Add the parser of `vila-triton convert` to the commands."""
    details = "A run that was killed is resumed by the same command."
    parser = add_command(commands, "convert", SUMMARIES["convert"], details)
    parser.add_argument("source", type=Path, help="a checkpoint folder")
    parser.add_argument("target", type=Path, help="a folder that does not exist yet")
    add_format_argument(parser, FORMATS)
    add_writing_arguments(parser)
    parser.set_defaults(run=run)


def add_format_argument(parser: argparse._ActionsContainer, formats: Sequence[str]) -> None:
    """Add --format, the layout on disk of int4 linears; "dense" dequantizes them."""
    read = renamed_values({"ours": "vila-triton"})
    layouts = f"layout of the int4 linears: {', '.join(formats)} (default: {formats[0]})"
    parser.add_argument("--format", type=read, choices=formats, default=formats[0], metavar="FORMAT", help=layouts)


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that writes a checkpoint."""
    size = Limits(float, 1e-9, 1e6)
    parser.add_argument("--shard-size", type=size, default=5.0, metavar="GB", help="of a file at most (default: 5)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the sizes, write nothing")


def run(args: argparse.Namespace) -> None:
    """Print the sizes of the checkpoint's parts and, unless `--dry-run` is given, write it in the layout asked for."""
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
    """Return the most bytes of a shard, from --shard-size."""
    return round(args.shard_size * 1e9)


def byte_progress() -> Progress:
    """Return a progress line that counts bytes."""
    from vila_triton.checkpoints.size_report import format_bytes

    return Progress(format_bytes)
