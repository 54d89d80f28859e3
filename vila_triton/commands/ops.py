"""`vila-triton ops`: every op, its implementations, which of them runs, and why; and where its gradient comes from."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vila_triton.arguments import add_command, kernel_arguments, parse_kernel_settings
from vila_triton.registry.size_ranges import implementation_names
from vila_triton.registry.target_configs import describe_choice

if TYPE_CHECKING:
    import torch

    from vila_triton.registry import Op
    from vila_triton.registry.size_ranges import Choice

FOOTER = """A call runs what is chosen here, in an engine or outside of one. To choose another: --set kernels.OP=NAME in
a command, `with use(OP="NAME")` in Python; the reference is `with use(OP="reference")`, or OP.reference(...)."""


QUESTION = "Which kernels run, and why?"
SUMMARIES = {"ops": "list every op, its implementations, which of them runs, and why"}


def configure(commands: Any) -> None:
    """Add the parser of `vila-triton ops` to the commands."""
    parser = add_command(commands, "ops", SUMMARIES["ops"], parents=[kernel_arguments()])
    parser.add_argument("--file", metavar="OP=NAME", help="print the path of this implementation's file, and no more")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table of ops for the device and the `--set` options of the command line, or the path of `--file`.

    Raises KeyError and ValueError for an op or an implementation that does not exist, and what `discover` raises.
    """
    import torch

    from vila_triton.device import pick_device
    from vila_triton.registry import OPS, discover, validate_choices

    discover(*args.kernels)
    if args.file:
        op, is_named, name = args.file.partition("=")
        if not is_named:
            raise ValueError(f"--file {args.file}: expected OP=NAME")
        validate_choices({op: name})
        print(OPS[op].impls[name].file)
        return

    no_gpu = args.device == "cuda" and not torch.cuda.is_available()
    print_ops(torch.device("cuda") if no_gpu else pick_device(args.device), parse_kernel_settings(args.set))
    if no_gpu:
        print(f"There is no GPU here; one with a tuned table goes by that first: {tuned_gpus() or 'no GPU has one'}.")


def tuned_gpus() -> str:
    """Return the names of the GPUs that have a tuned table."""
    from vila_triton.registry.tuned_tables import tables_dir

    return ", ".join(file.stem for file in sorted(tables_dir().glob("*.json")))


def print_ops(device: "torch.device", overrides: Mapping[str, str]) -> None:
    """Print every op, its implementations, the phases that each is chosen for on the device, and the reason; and where
    its gradient comes from.
    """
    from vila_triton.registry import OPS, discover, problems, use, validate_choices
    from vila_triton.registry.imports import shown_path
    from vila_triton.registry.kernel_config import PHASES
    from vila_triton.registry.tuned_tables import default_choices_for

    discover()
    validate_choices(overrides)
    with use(**overrides):
        choices = {phase: {**default_choices_for(device, phase), **overrides} for phase in PHASES}
    lines = []
    for name, op in OPS.items():
        phases = {phase: choices[phase].get(name, "reference") for phase in PHASES}
        for impl in op.impls.values():
            phases_by_sizes: dict[str, list[str]] = {}
            for phase, choice in phases.items():
                if impl.name in implementation_names(choice):
                    phases_by_sizes.setdefault(describe_sizes(choice, impl.name, op.dynamic_sizes), []).append(phase)
            runs_for = [
                " and ".join(names) + (f", {sizes}" if sizes else "") for sizes, names in phases_by_sizes.items()
            ]
            lines.append((name, impl.name, str(len(impl.configs)), "; ".join(runs_for) or "-", shown_path(impl.file)))
            if device.type == "cuda" and impl.by_target:
                targets: dict[str, list[str]] = {}
                for target, x in impl.by_target.items():
                    size_name = op.dynamic_sizes[0] if op.dynamic_sizes else ""
                    targets.setdefault(describe_choice(x, size_name), []).append(target)
                by_target = "; ".join(f"{', '.join(names)} {x}" for x, names in targets.items())
                lines.append(("", f"{impl.name} by default: {by_target}; otherwise config 0"))
        lines.append(("", f"because: {'--set' if name in overrides else choice_reason(device, name)}"))
        lines.append(("", f"gradient: {describe_gradient(op)}"))
    header = ("op", "implementation", "configs", f"chosen on {device.type} for", "file")
    widths = [max(len(line[i]) for line in [header, *lines] if len(line) > 2) + 2 for i in range(4)]
    for line in [header, *lines]:
        print("".join(f"{cell:{width}}" for cell, width in zip(line, widths)) + "".join(line[4:]))
    print("\n".join([*problems(), FOOTER]))


def describe_sizes(choice: "Choice", name: str, varying: tuple[str, ...]) -> str:
    """Say at which sizes a choice is this implementation; empty for all sizes."""
    return "" if isinstance(choice, str) else choice.describe(name, varying[0])


def describe_gradient(op: "Op") -> str:
    """Say which arguments of an op have a gradient, and what computes it."""
    from vila_triton.registry import OPS

    if op.gradient_refusal:
        return f"none, {op.gradient_refusal}"
    if op.gradient_rule is None:
        return "the reference is run again, and torch differentiates it"
    made_of = ", ".join(name for name in op.gradient_rule.__code__.co_names if name in OPS)
    return f"of {', '.join(op.differentiable)}, by {made_of or 'torch'}"


def choice_reason(device: "torch.device", op: str) -> str:
    """Name the file that chooses the implementations of an op on a device."""
    from vila_triton.registry import OPS
    from vila_triton.registry.kernel_config import PHASES, configured_choices
    from vila_triton.registry.tuned_tables import gpu_name, load_table, table_choice, table_path, tables_dir

    device_name = gpu_name(device)
    if device_name and op in load_table(device_name)["choices"] and (size_range := table_choice(op, device_name)):
        file, size = table_path(device_name, tables_dir()).name, OPS[op].dynamic_sizes[0]
        sizes = f"{size} {size_range.first} to {size_range.last}"
        return f"configs/tuned/{file} chooses for this GPU, {sizes}; configs/kernels.toml beyond"
    is_configured = any(op in configured_choices(device.type, phase) for phase in PHASES)
    return f"configs/kernels.toml names {'it' if is_configured else 'none'} for {device.type}"
