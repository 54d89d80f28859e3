"""Arguments that commands have in common: where to run, with which kernels, which model."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .paths import BUNDLED_CHECKPOINT

if TYPE_CHECKING:
    import torch

KV_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
NUMERICS = ("fast", "invariant")
DTYPES = ("float16", "bfloat16", "float32")


def kernel_arguments() -> argparse.ArgumentParser:
    """--device and --set, for `parents=`; see `settle`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="kernels.OP=NAME",
        help="run this implementation of an op; kernels.*=NAME for every op that has one of that name",
    )
    return parser


def model_arguments() -> argparse.ArgumentParser:
    """Those of `kernel_arguments`, and which model, for `parents=`."""
    parser = argparse.ArgumentParser(add_help=False, parents=[kernel_arguments()])
    parser.add_argument(
        "--model", type=Path, default=BUNDLED_CHECKPOINT, help="a VILA folder (default: the bundled tiny model)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="(default: what the model's config says)")
    return parser


def parse_kernel_settings(settings: list[str]) -> dict[str, str]:
    """`kernels.OP=NAME` settings as {op: name}. Errors: ValueError, KeyError."""
    from .registry import OPS, discover

    kernel_choices: dict[str, str] = {}
    if settings:
        discover()
    for setting in settings:
        key, _, name = setting.partition("=")
        op = key.removeprefix("kernels.")
        if op == key or not name:
            raise ValueError(f"--set {setting}: expected kernels.OP=NAME")
        kernel_choices |= {o: name for o, entry in OPS.items() if name in entry.impls} if op == "*" else {op: name}
        if op == "*" and name not in kernel_choices.values():
            raise ValueError(f"--set {setting}: no op has an implementation {name!r}")
    return kernel_choices


def resolve_device_and_kernels(args: argparse.Namespace) -> tuple["torch.device", dict[str, str]]:
    """The device and the chosen kernels. Errors: ValueError, KeyError for what is not there."""
    from .device import pick_device

    device = pick_device(args.device)
    if device.type == "cpu" and args.set:
        # Must be set before triton is first imported; the line under an answer says that kernels ran interpreted.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return device, parse_kernel_settings(args.set)
