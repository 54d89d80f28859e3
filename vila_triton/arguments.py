"""Command-line arguments that commands share, and options under the names that they had before."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import note_new_spelling
from .paths import BUNDLED_CHECKPOINT

if TYPE_CHECKING:
    import torch

KV_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
NUMERICS = ("fast", "batch_invariant")
DTYPES = ("float16", "bfloat16", "float32")
KERNELS_HELP = "a .py file with kernels of your own, or a folder of them, which is run; may be repeated"


class OldOption(argparse.Action):
    """An option under its old name, for one more release: it does what `new` does and says the new name on stderr."""

    def __init__(self, option_strings: list[str], dest: str, new: argparse.Action, **kwargs: Any):
        kwargs |= {"nargs": new.nargs, "type": new.type, "choices": new.choices}
        super().__init__(option_strings, new.dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kwargs)
        self.new = new

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        note_new_spelling(str(option_string), self.new.option_strings[0])
        self.new(parser, namespace, values, option_string)


def renamed_values(new_names: Mapping[str, str]) -> Callable[[str], str]:
    """Return a `type=` for an option that takes old names of its values for one more release, with a note on stderr."""

    def read(text: str) -> str:
        if text in new_names:
            note_new_spelling(text, new_names[text])
        return new_names.get(text, text)

    return read


def add_command(commands: Any, name: str, summary: str, details: str = "", **kwargs: Any) -> argparse.ArgumentParser:
    """Add the parser of a command; its help has a line for each option."""
    wide = partial(argparse.HelpFormatter, max_help_position=30, width=120)
    description = f"{summary[0].upper()}{summary[1:]}. {details}"
    return commands.add_parser(name, help=summary, description=description, formatter_class=wide, **kwargs)


def kernel_arguments(with_emulate: bool = False) -> argparse.ArgumentParser:
    """Return a parent parser with --device, --kernels and --set, and --emulate for commands that run a model.

    `resolve_device_and_kernels` reads them.
    """
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("where and with which kernels it runs")
    group.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    if with_emulate:
        emulate = (
            "an emulated GPU, as sm_80 or sm_90: its kernels, as compiled for it, run on the CPU; minutes an answer"
        )
        group.add_argument("--emulate", metavar="TARGET", help=emulate)
    add_kernels_argument(group)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="kernels.OP=NAME",
        help="run this implementation of an op; kernels.*=NAME for every op that has one of that name",
    )
    return parser


def add_kernels_argument(parser: argparse._ActionsContainer) -> None:
    """Add --kernels, which `discover_kernels` reads."""
    parser.add_argument("--kernels", action="append", default=[], metavar="PATH", help=KERNELS_HELP)


def discover_kernels(args: argparse.Namespace) -> None:
    """Make the kernels of --kernels known. Errors: what `registry.discover` raises."""
    if args.kernels:
        from .registry import discover

        discover(*args.kernels)


def model_arguments() -> argparse.ArgumentParser:
    """Return a parent parser with the arguments of `kernel_arguments`, --model and --dtype."""
    parser = argparse.ArgumentParser(add_help=False, parents=[kernel_arguments(with_emulate=True)])
    group = parser.add_argument_group("which model")
    folder = "a checkpoint folder (default: the bundled tiny model)"
    group.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT, metavar="FOLDER", help=folder)
    dtypes = f"of parameters and activations: {', '.join(DTYPES)} (default: as in config.json)"
    group.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help=dtypes)
    return parser


def parse_kernel_settings(settings: list[str]) -> dict[str, str]:
    """Parse `kernels.OP=NAME` settings to {op: implementation}. Errors: ValueError."""
    from .registry import OPS, discover

    choices: dict[str, str] = {}
    if settings:
        discover()
    for setting in settings:
        key, _, name = setting.partition("=")
        op = key.removeprefix("kernels.")
        if op == key or not name:
            raise ValueError(f"--set {setting}: expected kernels.OP=NAME")
        choices |= {o: name for o, entry in OPS.items() if name in entry.impls} if op == "*" else {op: name}
        if op == "*" and name not in choices.values():
            raise ValueError(f"--set {setting}: no op has an implementation {name!r}")
    return choices


def emulate_gpu(target: str) -> None:
    """Make cuda a GPU that is emulated, for the rest of the process; before triton is first imported.

    Errors: ValueError for a target that the emulator does not know, or if its package, bench, is not found.
    """
    try:
        standin = import_module("bench.standin")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("bench"):
            raise
        where = "the emulator is in bench, which is installed with vila-triton, and is not found here"
        raise ValueError(f"--emulate {target}: {where}") from None
    standin.activate(target)


def emulated_gpu() -> str | None:
    """Return the target of the GPU that this process emulates, if it does."""
    standin = sys.modules.get("bench.standin")
    return standin.emulated if standin else None


def resolve_device_and_kernels(args: argparse.Namespace) -> tuple["torch.device", dict[str, str]]:
    """Return the device of --device or --emulate and the implementations of --set, once --kernels are discovered.

    Errors: ValueError for what does not exist, and what `registry.discover` raises.
    """
    if args.emulate:
        if args.device not in (None, "cuda"):
            raise ValueError(f"--emulate {args.emulate} is a GPU, and --device {args.device} is another device")
        emulate_gpu(args.emulate)
    from .device import pick_device

    device = pick_device(args.device)
    if device.type == "cpu" and args.set:
        # Must be set before triton is first imported; the line under an answer says that kernels ran interpreted.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    discover_kernels(args)
    return device, parse_kernel_settings(args.set)
