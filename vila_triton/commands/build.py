"""`vila-triton build`: a released model with random weights, for benchmarks and tests."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vila_triton.limits import COUNT, SEED

from .convert import FORMATS, add_writing_arguments, byte_progress, shard_bytes


def configure(commands: Any) -> None:
    summary = "a model of configs/models/ with random weights, in the layout of its release"
    parser = commands.add_parser(
        "build", help=summary, description=f"Write {summary}, with a tokenizer of single bytes."
    )
    parser.add_argument("model", help="such as vila1.5-3b, or the path of a .toml file")
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    parser.add_argument("--layers", type=COUNT, help="only so many of the language model, and as many of the tower")
    parser.add_argument("--narrow", type=COUNT, default=1, metavar="N", help="all widths divided by N")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float16")
    parser.add_argument(
        "--int4", type=COUNT, metavar="GROUP", help="linears rounded to int4 in groups of so many inputs"
    )
    parser.add_argument("--format", choices=FORMATS, default="ours", help="of the int4 linears (ours)")
    parser.add_argument("--seed", type=SEED, default=0)
    add_writing_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from vila_triton.checkpoints import random_checkpoint, size_report
    from vila_triton.checkpoints.writing import write_checkpoint

    config = random_checkpoint.scale_down(random_checkpoint.read_model_toml(args.model), args.layers, args.narrow)
    source = random_checkpoint.random_checkpoint(config, args.dtype, args.int4, args.seed)
    for line in size_report.size_table(source, args.format):
        print(line)
    input_sizes = config["llm"]["hidden_size"], config["llm"]["intermediate_size"]
    group_sizes = (group_size for group_size in (128, 64, 32) if not any(k % group_size for k in input_sizes))
    for name, group in (("fp16", None), ("int4", args.int4 or next(group_sizes, None))):
        if name == "int4" and group is None:
            continue  # too narrow for any
        sized_source = random_checkpoint.random_checkpoint(config, group_size=group)
        label = f"{name}, groups of {group}" if group else name
        print(f"{label}: {size_report.format_bytes(sum(map(size_report.total_bytes, sized_source.tensors.values())))}")
    if args.dry_run:
        return
    with tempfile.TemporaryDirectory() as folder:
        source = replace(source, beside=random_checkpoint.write_tokenizer_and_processor(config, Path(folder)))
        key = f"{args.model} {args.layers} {args.narrow} {args.dtype} {args.int4} {args.seed}"
        write_checkpoint(
            source,
            args.target,
            args.format,
            max_shard_bytes=shard_bytes(args),
            progress=byte_progress(),
            source_key=key,
        )
    print(f"{args.target}: written")
