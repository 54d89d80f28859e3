"""`vila-triton serve`: a model as an OpenAI server with a chat page, on vLLM."""

import argparse
import errno
import os
import sys
from pathlib import Path
from typing import Any

from vila_triton.arguments import (
    DTYPES,
    add_command,
    add_kernels_argument,
    discover_kernels,
    parse_kernel_settings,
)
from vila_triton.limits import COUNT, Limits
from vila_triton.paths import BUNDLED_CHECKPOINT

QUESTION = "What is in my images?"
SUMMARIES = {"serve": "answer over HTTP, to OpenAI clients and on a chat page; needs vLLM"}
BUNDLED_NAME = "vila-tiny"
PORT = Limits(int, 0, 65535)


def configure(commands: Any) -> None:
    """Add the parser of `vila-triton serve` to the commands."""
    details = "Options behind `--` go to `vllm serve` as they are. Ctrl-C ends it."
    parser = add_command(commands, "serve", SUMMARIES["serve"], details)
    folder = "a checkpoint folder (default: the bundled tiny model)"
    parser.add_argument("model", type=Path, nargs="?", default=BUNDLED_CHECKPOINT, metavar="MODEL", help=folder)
    parser.add_argument("--name", help="of the model, for clients (default: the folder's)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=PORT, default=8000, metavar="N", help="0 is any free one (default: 8000)")
    dtypes = f"of parameters and activations: {', '.join(DTYPES)} (default: as in config.json)"
    parser.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help=dtypes)
    parser.add_argument("--max-images", type=COUNT, default=16, metavar="N", help="in a request (default: 16)")
    parser.add_argument("--max-body-mib", type=COUNT, default=32, metavar="N", help="of a request (default: 32)")
    add_kernels_argument(parser)
    kernels = "run this implementation of an op; kernels.*=NAME for every op that has one of that name"
    parser.add_argument("--set", action="append", default=[], metavar="kernels.OP=NAME", help=kernels)
    keep_what_follows_dashes(parser, "vllm_options")
    parser.set_defaults(run=run)


def keep_what_follows_dashes(parser: argparse.ArgumentParser, dest: str) -> None:
    """Let a parser put what stands behind `--` into `dest` as it is: the options of another program."""
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        own: list[str] = list(args or ())
        end = own.index("--") if "--" in own else len(own)
        namespace, unknown = parse(own[:end], namespace)
        setattr(namespace, dest, own[end + 1 :])
        return namespace, unknown

    parser.parse_known_args = parse_known_args


def run(args: argparse.Namespace) -> None:
    """Serve the model until Ctrl-C. Errors: RuntimeError without vLLM; those of a folder; for an unknown kernel."""
    from vila_triton.vllm_plugin import server

    server.require_vllm()
    from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
    from vila_triton.device import pick_device
    from vila_triton.registry import validate_choices

    on_cpu = pick_device().type == "cpu"
    if on_cpu and (args.set or args.kernels):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is first imported, here and in vLLM's processes
    discover_kernels(args)
    kernels = parse_kernel_settings(args.set)
    validate_choices(kernels)
    settings = server.ServerSettings(
        args.model,
        args.name or (BUNDLED_NAME if args.model == BUNDLED_CHECKPOINT else args.model.resolve().name),
        args.host,
        args.port,
        args.dtype,
        kernels,
        [Path(path) for path in args.kernels],
        max_images=args.max_images,
        max_body_mib=args.max_body_mib,
        on_cpu=on_cpu,
        vllm_options=args.vllm_options,
    )
    arguments = server.vllm_arguments(settings, check_checkpoint(open_checkpoint(args.model)))
    print(f"starting vLLM with {settings.name} ...", file=sys.stderr, flush=True)
    try:
        server.serve(arguments)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise OSError(f"{args.host}:{args.port} is taken, expected --port N of a free one, or 0 for any") from None
