"""`vila-triton build`: a released model with random weights, for benchmarks and tests."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vila_triton.arguments import OldOption, add_command
from vila_triton.limits import COUNT, SEED

from .convert import FORMATS, add_format_argument, add_writing_arguments, byte_progress, shard_bytes

QUESTION = "How do I get the checkpoint that I want?"
SUMMARIES = {"build": "write a model of configs/models/ with random weights, in the layout of its release"}


def configure(commands: Any) -> None:
    """Add the parser of `vila-triton build` to the commands."""
    parser = add_command(commands, "build", SUMMARIES["build"], "Its tokenizer has single bytes as tokens.")
    parser.add_argument("model", help="such as vila1.5-3b, or the path of a .toml file")
    parser.add_argument("target", type=Path, help="a folder that does not exist yet")
    layers = "this many layers of the language model, and of the vision tower at most"
    parser.add_argument("--layers", type=COUNT, metavar="N", help=f"{layers} (default: all)")
    divisor = parser.add_argument("--width-divisor", type=COUNT, default=1, metavar="N", help="divide all widths by N")
    parser.add_argument("--narrow", action=OldOption, new=divisor)
    dtypes = ("float16", "bfloat16", "float32", "float64")
    dtype = f"of the weights: {', '.join(dtypes)} (default: float16)"
    parser.add_argument("--dtype", choices=dtypes, default="float16", metavar="DTYPE", help=dtype)
    parser.add_argument("--int4", type=COUNT, metavar="GROUP_SIZE", help="quantize the linears, in groups of this size")
    add_format_argument(parser, FORMATS)
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the random weights (default: 0)")
    add_writing_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the sizes of the model and, unless `--dry-run` is given, write it with random weights."""
    from vila_triton.checkpoints import random_checkpoint, size_report
    from vila_triton.checkpoints.writing import write_checkpoint

    config = random_checkpoint.scale_down(
        random_checkpoint.read_model_toml(args.model), args.layers, args.width_divisor
    )
    source = random_checkpoint.random_checkpoint(config, args.dtype, args.int4, args.seed)
    for line in size_report.size_table(source, args.format):
        print(line)
    input_sizes = config["llm"]["hidden_size"], config["llm"]["intermediate_size"]
    group_sizes = (group_size for group_size in (128, 64, 32) if not any(k % group_size for k in input_sizes))
    for name, group in (("fp16", None), ("int4", args.int4 or next(group_sizes, None))):
        if name == "int4" and group is None:
            continue  # no group size divides the widths
        sized_source = random_checkpoint.random_checkpoint(config, group_size=group)
        label = f"{name}, groups of {group}" if group else name
        print(f"{label}: {size_report.format_bytes(sum(map(size_report.total_bytes, sized_source.tensors.values())))}")
    if args.dry_run:
        return
    with tempfile.TemporaryDirectory() as folder:
        source = replace(source, companion_dirs=random_checkpoint.write_tokenizer_and_processor(config, Path(folder)))
        key = f"{args.model} {args.layers} {args.width_divisor} {args.dtype} {args.int4} {args.seed}"
        write_checkpoint(
            source,
            args.target,
            args.format,
            max_shard_bytes=shard_bytes(args),
            progress=byte_progress(),
            source_key=key,
        )
    print(f"{args.target}: written")
