"""Adds to the Python of a kernel what finds registers that are used too early: before they are written, or awaited.

Both are first looked for in the text: where every path to a use writes the register, nothing is added. Elsewhere a
register gets a companion, a predicate that says in which threads its value comes from registers that were written. It
follows values through arithmetic and shuffles, since compilers compute much of which nothing is used, and is checked
where a value matters: in memory, tensor cores, guards and branches. Of the accumulators of wgmma the machine keeps the
group that they are awaited with, which a `mov` passes on.
"""

from collections.abc import Callable

from . import dataflow
from .demanded_bytes import demanded_bytes, operand_bytes
from .ptx import Kernel
from .writer import Step

Steps = list[list[Step]]


def add_checks(kernel: Kernel, steps: Steps) -> set[str]:
    """Adds the checks to the steps of a kernel's blocks. Returns the names of the companions."""
    add_source_checks(kernel, steps)
    add_accumulator_checks(kernel, steps)
    return add_unwritten_checks(kernel, steps)


def companion(name: str) -> str:
    """The name of the register that says which threads have written another."""
    return f"{name}written"


# ---- registers that are not written

PASS_ON = {  # opcodes that only compute: what they make of a value that is not written is not written
    *(
        "add",
        "sub",
        "mul",
        "mad",
        "fma",
        "div",
        "rem",
        "min",
        "max",
        "neg",
        "abs",
        "mul24",
        "mad24",
        "sad",
        "dp4a",
        "dp2a",
    ),
    *(
        "ex2",
        "lg2",
        "sin",
        "cos",
        "tanh",
        "rcp",
        "sqrt",
        "rsqrt",
        "copysign",
        "testp",
        "cvt",
        "cvta",
        "mov",
        "selp",
        "slct",
    ),
    *("and", "or", "xor", "not", "cnot", "shl", "shr", "shf", "bfe", "bfi", "bmsk", "szext", "lop3", "prmt", "popc"),
    *("clz", "brev", "bfind", "setp", "set", "shfl", "addc", "subc", "madc"),
}


def passes_on(step: Step) -> bool:
    """True if a step only computes, so that its result is as good as its operands."""
    return step.instruction.opcode in PASS_ON


def step_through(
    block: list[Step],
    known: set[str],
    unsure: list[tuple[Step, list[str]]] | None = None,
    matters: Callable[[Step, str], bool] = lambda step, name: True,
) -> set[str]:
    """The registers that are surely written after a block, if `known` are before it.

    Gathers in `unsure` the steps that read others that matter there, with these.
    """
    known = set(known)
    for step in block:
        unknown = [name for name in dict.fromkeys(step.reads) if name not in known and matters(step, name)]
        if unknown and unsure is not None:
            unsure.append((step, unknown))
        if unknown and passes_on(step):
            known -= set(step.writes)
        elif step.guard is None:
            known |= set(step.writes)
    return known


def add_unwritten_checks(kernel: Kernel, steps: Steps) -> set[str]:
    """Companions for registers that some path leaves unwritten, and a check wherever one matters."""
    if not (unsure := unsure_steps(kernel, steps, lambda step, name: True)):
        return set()
    demanded = demanded_bytes((step for block in steps for step in block), passes_on)
    unsure = unsure_steps(
        kernel, steps, lambda step, name: bool(operand_bytes(step, demanded, passes_on(step)).get(name))
    )
    unknown_of = {id(step): unknown for step, unknown in unsure}
    watched = {name for unknown in unknown_of.values() for name in unknown}
    for step in (step for block in steps for step in block):
        unknown = unknown_of.get(id(step), [])
        written = {name for name in step.writes if name in watched}
        if unknown or written:
            watch_step(step, unknown, [name for name in dict.fromkeys(step.writes) if name in written])
    return {companion(name) for name in watched}


def unsure_steps(kernel: Kernel, steps: Steps, matters: Callable[[Step, str], bool]) -> list[tuple[Step, list[str]]]:
    """The steps that read registers which some path leaves unwritten, with those that matter there."""

    def known_behind(n: int, known: set[str]) -> set[str]:
        return step_through(steps[n], known, matters=matters)

    unsure: list[tuple[Step, list[str]]] = []
    for block, known in zip(steps, dataflow.known_at_entry(kernel.blocks, known_behind, kernel.registers)):
        step_through(block, known, unsure, matters)
    return unsure


def watch_step(step: Step, unknown: list[str], written: list[str]) -> None:
    """Adds to a step the checks of registers that may be unwritten, or what it makes of their companions."""
    i, guard = step.instruction.id, step.guard
    guarding = step.instruction.guard.name if step.instruction.guard else None
    if not passes_on(step):
        checked, value = unknown, "TRUE"
    else:
        checked = [name for name in unknown if name == guarding]
        value = companions_value(step, [name for name in unknown if name not in checked])
    for name in checked:
        mask = "None" if name == guarding else step.used_where.get(name, guard)
        step.lines.insert(0, f"M.check_written({i}, {companion(name)}, {mask})")
    if written:
        step.lines.insert(0, f"written_ = {value}")  # before a result takes the place of an operand
        for name in written:
            step.lines.append(
                f"{companion(name)} = " + (f"np.where({guard}, written_, {companion(name)})" if guard else "written_")
            )
    step.reads += [companion(name) for name in unknown]
    step.writes += [companion(name) for name in written]


def companions_value(step: Step, unknown: list[str]) -> str:
    """An expression for where the result of a step is written, by the companions of its operands."""
    if not unknown:
        return "TRUE"
    if step.choice:
        condition, yes, no = step.choice
        sides = (companion(name) if name in unknown else "TRUE" for name in (yes, no))
        terms = ["np.where({}, {}, {})".format(condition, *sides)]
        terms += [companion(name) for name in unknown if name not in (yes, no)]
    else:
        terms = [companion(name) for name in unknown]
    value = " & ".join(terms)
    return step.spread.format(value) if step.spread else value


# ---- accumulators of wgmma that are not awaited


def waits_for_all(step: Step) -> bool:
    """True if no product of wgmma is unfinished behind a step."""
    i = step.instruction
    return i.opcode == "wgmma" and i.modifiers[0] == "wait_group" and step.waits == 0


def step_through_products(block: list[Step], pending: set[str]) -> set[str]:
    """The registers that wgmma may still be computing after a block, if it may be those before it."""
    pending = set(pending)
    for step in block:
        if step.accumulators:
            pending |= set(step.accumulators)
        elif waits_for_all(step):
            pending = set()
        else:
            moved = {to for to, source in step.copies.items() if source in pending}
            pending = (pending - set(step.writes)) | moved
    return pending


def add_accumulator_checks(kernel: Kernel, steps: Steps) -> None:
    """A check at each read of a register that wgmma may still be computing."""
    if not any(step.accumulators for block in steps for step in block):
        return
    entry = dataflow.possible_at_entry(kernel.blocks, lambda n, pending: step_through_products(steps[n], pending))
    for block, pending in zip(steps, entry):
        for step in block:
            i = step.instruction.id
            after = step_through_products([step], pending)
            early = pending.intersection(step.reads) - set(step.accumulators)
            changed = {name: source for name, source in step.copies.items() if source in pending or name in pending}
            if step.accumulators:
                step.lines.append(f"M.accumulators.begin({tuple(step.accumulators)})")
            elif changed:
                step.lines += [
                    f"M.accumulators.copy_register({name!r}, {source!r})" for name, source in changed.items()
                ]
                early -= set(changed.values())
            elif dropped := pending.intersection(step.writes):
                step.lines.append(f"M.accumulators.forget({tuple(sorted(dropped))})")
            if early:
                step.lines.insert(0, f"M.check_awaited({i}, {tuple(sorted(early))}, {step.guard})")
            pending = after


def step_through_sources(block: list[Step], busy: set[str]) -> set[str]:
    """The registers that wgmma may still be reading after a block, if it may be those before it."""
    for step in block:
        busy = set() if waits_for_all(step) else busy | set(step.sources)
    return busy


def add_source_checks(kernel: Kernel, steps: Steps) -> None:
    """A check at each write of a register that wgmma may still be reading."""
    if not any(step.sources for block in steps for step in block):
        return
    entry = dataflow.possible_at_entry(kernel.blocks, lambda n, busy: step_through_sources(steps[n], busy))
    for block, busy in zip(steps, entry):
        for step in block:
            if changed := sorted(busy.intersection(step.writes)):
                names = tuple(f"source {name}" for name in changed)
                step.lines.insert(
                    0, f"M.check_awaited({step.instruction.id}, {names}, {step.guard}, 'writes a source')"
                )
            if step.sources:
                step.lines.append(f"M.accumulators.begin({tuple(f'source {name}' for name in step.sources)})")
            busy = step_through_sources([step], busy)
