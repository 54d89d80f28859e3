"""`vila-triton ops`: every op, its implementations, and which of them is chosen, and why."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_triton.arguments import choices, kernel_arguments
from vila_triton.registry.size_ranges import names

if TYPE_CHECKING:
    import torch

    from vila_triton.registry.size_ranges import Choice

RULE = """A call runs what is chosen here, in an engine or outside of one. To choose another: --set kernels.OP=NAME in a
command, `with use(OP="NAME")` in Python; the reference is `with use(OP="reference")`, or OP.reference(...)."""


def configure(commands: Any) -> None:
    about = "every op, its implementations and which one is chosen, and why"
    commands.add_parser("ops", parents=[kernel_arguments()], help=about).set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    from vila_triton.registry.kernel_config import pick_device

    absent = args.device == "cuda" and not torch.cuda.is_available()
    print_ops(torch.device("cuda") if absent else pick_device(args.device), choices(args.set))
    if absent:
        print(f"There is no GPU here; one with a tuned table goes by that first: {tables() or 'no GPU has one'}.")


def tables() -> str:
    """The GPUs that are tuned."""
    from vila_triton.registry.tuned_tables import folder

    return ", ".join(file.stem for file in sorted(folder().glob("*.json")))


def print_ops(device: "torch.device", chosen: Mapping[str, str]) -> None:
    from vila_triton.registry import OPS, broken, checked, discover, use
    from vila_triton.registry.kernel_config import PHASES
    from vila_triton.registry.tuned_tables import kernels_for

    discover()
    checked(chosen)
    with use(**chosen):
        choices = {phase: {**kernels_for(device, phase), **chosen} for phase in PHASES}
    root = Path(__file__).resolve().parents[2]
    lines = []
    for name, op in OPS.items():
        phases = {phase: choices[phase].get(name, "reference") for phase in PHASES}
        for impl in op.impls.values():
            when: dict[str, list[str]] = {}  # the sizes it runs at -> in which phases
            for phase, choice in phases.items():
                if impl.name in names(choice):
                    when.setdefault(sizes(choice, impl.name, op.varying), []).append(phase)
            why = "; ".join(" and ".join(of) + (at and f", {at}") for at, of in when.items()) or "-"
            file = impl.file.relative_to(root) if impl.file.is_relative_to(root) else impl.file
            lines.append((name, impl.name, str(len(impl.configs)), why, str(file)))
        lines.append(("", f"because: {'--set' if name in chosen else reason(device, name)}"))
    head = ("op", "implementation", "configs", f"chosen on {device.type} for", "file")
    widths = [max(len(line[i]) for line in [head, *lines] if len(line) > 2) + 2 for i in range(4)]
    for line in [head, *lines]:
        print("".join(f"{word:{width}}" for word, width in zip(line, widths)) + "".join(line[4:]))
    print("\n".join([*broken(), RULE]))


def sizes(choice: "Choice", name: str, varying: tuple[str, ...]) -> str:
    """At which sizes a choice is this implementation, in words; nothing if at all."""
    return "" if isinstance(choice, str) else choice.where(name, varying[0])


def reason(device: "torch.device", op: str) -> str:
    from vila_triton.registry import OPS
    from vila_triton.registry.kernel_config import PHASES, configured
    from vila_triton.registry.tuned_tables import choice_of, file_of, folder, name_of, table_of

    name = name_of(device)
    if name and op in table_of(name)["choices"] and (within := choice_of(op, name)):
        sizes = f"{OPS[op].varying[0]} {within.first} to {within.last}"
        return (
            f"configs/tuned/{file_of(name, folder()).name} chooses for this GPU, {sizes}; configs/kernels.toml beyond"
        )
    named = any(op in configured(device.type, phase) for phase in PHASES)
    return f"configs/kernels.toml names {'it' if named else 'none'} for {device.type}"
