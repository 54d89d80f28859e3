"""`vila-triton build`: a released model with random weights, for benchmarks and tests."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vila_triton.limits import COUNT, SEED

from .convert import FORMS, limit, progress, writing


def configure(commands: Any) -> None:
    about = "a model of configs/models/ with random weights, in the layout of its release"
    parser = commands.add_parser("build", help=about, description=f"Write {about}, with a tokenizer of single bytes.")
    parser.add_argument("model", help="such as vila1.5-3b, or the path of a .toml file")
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    parser.add_argument("--layers", type=COUNT, help="only so many of the language model, and as many of the tower")
    parser.add_argument("--narrow", type=COUNT, default=1, metavar="N", help="all widths divided by N")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float16")
    parser.add_argument(
        "--int4", type=COUNT, metavar="GROUP", help="linears rounded to int4 in groups of so many inputs"
    )
    parser.add_argument("--format", choices=FORMS, default="ours", help="of the int4 linears (ours)")
    parser.add_argument("--seed", type=SEED, default=0)
    writing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from vila_triton.checkpoints import random_checkpoint, size_report
    from vila_triton.checkpoints.writing import write

    found = random_checkpoint.narrowed(random_checkpoint.table(args.model), args.layers, args.narrow)
    source = random_checkpoint.random_source(found, args.dtype, args.int4, args.seed)
    for line in size_report.lines(source, args.format):
        print(line)
    inputs = found["llm"]["hidden_size"], found["llm"]["intermediate_size"]
    fits = (group for group in (128, 64, 32) if not any(k % group for k in inputs))
    for name, group in (("fp16", None), ("int4", args.int4 or next(fits, None))):
        if name == "int4" and group is None:
            continue  # too narrow for any
        other = random_checkpoint.random_source(found, group=group)
        words = f"{name}, groups of {group}" if group else name
        print(f"{words}: {size_report.size(sum(map(size_report.nbytes, other.tensors.values())))}")
    if args.dry_run:
        return
    with tempfile.TemporaryDirectory() as folder:
        source = replace(source, beside=random_checkpoint.write_companions(found, Path(folder)))
        key = f"{args.model} {args.layers} {args.narrow} {args.dtype} {args.int4} {args.seed}"
        write(source, args.target, args.format, limit=limit(args), progress=progress(), key=key)
    print(f"{args.target}: written")
