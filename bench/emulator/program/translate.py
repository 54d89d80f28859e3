"""Turns a kernel into Python: one function for each basic block.

The function of a block takes the machine and its registers, a list of arrays. It loads those that it needs into local
variables, runs, stores those that are needed afterwards, and returns the condition of its branch. Where not all threads
run, it computes for all of them, and stores for those that do; what memory does is masked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from ..arithmetic import conversions, integers, numbers, numbers64
from ..memory.local_memory import GenericMemory
from . import dataflow, register_checks
from .declarations import place_variables
from .instructions import bits, control, conversion, floating, integer, memory, moves, tensor_core, warp
from .instructions.table import EMITTERS, RUNTIME
from .kinds import UNSIGNED
from .memory_facts import MemoryFacts, memory_facts
from .ptx import Block, Instruction, Kernel, UnknownPTX
from .writer import NUMPY, Step, Writer

GROUPS: tuple[ModuleType, ...] = (bits, control, conversion, floating, integer, memory, moves, tensor_core, warp)


@dataclass
class BlockCode:
    """A basic block as it runs.

    source   the Python
    meeting  where threads that part at its end meet again
    may_wait  a loop that waits for other blocks of the grid may run it
    """

    block: Block
    run: Callable[[Any, list], np.ndarray | None]
    source: str
    meeting: int
    has_barrier: bool
    may_wait: bool


@dataclass
class Program:
    """A kernel that can run.

    registers    their bits, 1 for predicates, in the order in which machines hold them
    variables    global variables: name -> bytes
    remembered   accesses to each memory that were checked before
    """

    kernel: Kernel
    blocks: list[BlockCode]
    instructions: dict[int, Instruction]
    registers: list[int]
    memory: MemoryFacts
    variables: dict[str, np.ndarray]
    remembered: dict[str, dict] = field(default_factory=dict)


def translate(kernel: Kernel) -> Program:
    """The program of a kernel. Errors: UnknownPTX for an instruction that is not emulated, with its source line."""
    space = names_for_code()
    variables = place_variables(kernel.global_variables)
    writer = Writer(kernel, space, {name: data.ctypes.data for name, data in variables.items()})
    steps = [write_block(writer, block) for block in kernel.blocks]
    companions = register_checks.add_checks(kernel, steps)
    registers = kernel.registers | dict.fromkeys(sorted(companions), 1)
    read_first = [first_reads(block) for block in steps]
    written = [{name for step in block for name in step.writes} for block in steps]
    live = dataflow.live_at_entry(kernel.blocks, read_first, written)
    meeting = dataflow.meeting_points(kernel.blocks)
    index = {name: n for n, name in enumerate(registers)}
    codes = []
    for block, block_steps in zip(kernel.blocks, steps):
        n = block.index
        kept = sorted(written[n] & dataflow.live_at_exit(block, live), key=index.__getitem__)
        source = function_source(block, block_steps, sorted(read_first[n]), kept, index)
        exec(compile(source, f"<{kernel.name}, block {n}>", "exec"), space)
        barrier = any(i.opcode in ("bar", "barrier") and "warp" not in i.modifiers for i in block.instructions)
        codes.append(
            BlockCode(block, space[f"block_{n}"], source, meeting[n], barrier, any(map(may_wait, block.instructions)))
        )
    instructions = {i.id: i for block in kernel.blocks for i in block.instructions}
    facts = memory_facts(x.statement for x in instructions.values())
    return Program(kernel, codes, instructions, list(registers.values()), facts, variables)


def may_wait(instruction: Instruction) -> bool:
    """True for what a loop holds that waits for another block of the grid: an atomic, or a load that sees stores."""
    return instruction.opcode == "atom" or not {"volatile", "relaxed", "acquire"}.isdisjoint(instruction.modifiers)


def names_for_code() -> dict[str, Any]:
    """The names that generated code finds."""
    space: dict[str, Any] = {"np": np, "numbers64": numbers64}
    for module in (numbers, integers, conversions):
        space.update({name: x for name, x in vars(module).items() if not name.startswith("_")})
    space.update(RUNTIME)
    return (
        space
        | NUMPY
        | {
            "u4_": array_of(np.uint32),
            "u8_": array_of(np.uint64),
            "TRUE": np.ones((1, 1), bool),
            "GenericMemory": GenericMemory,
        }
    )


def array_of(dtype: type) -> Callable[[list], np.ndarray]:
    """A function that makes arrays of a type, of integers modulo its range."""
    bits = np.dtype(dtype).itemsize * 8
    return lambda value: np.array([[int(value[0][0]) & (2**bits - 1)]], dtype)


def write_block(writer: Writer, block: Block) -> list[Step]:
    """The steps of a block's instructions."""
    writer.start_block()
    steps, n = [], 0
    while n < len(block.instructions):
        i = block.instructions[n]
        run = [i]
        try:
            steps.append(writer.start(i))
            if tensor_core.begins_run(i):
                while n + len(run) < len(block.instructions) and continues_run(i, block.instructions[n + len(run)]):
                    run.append(block.instructions[n + len(run)])
                tensor_core.emit_run(writer, run)
            elif i.opcode in EMITTERS:
                EMITTERS[i.opcode](writer, i)
            else:
                raise UnknownPTX("this instruction")
        except (UnknownPTX, KeyError, IndexError, ValueError, AttributeError, AssertionError) as error:
            reason = error if isinstance(error, UnknownPTX) else "this form"
            raise UnknownPTX(
                f"{reason} is not emulated: {i.text} ({writer.kernel.name}, {i.source or 'no source line'})"
            ) from error
        n += len(run)
    final = writer.held.items()
    if steps:
        steps[-1].lines += [
            f"{name} = {name}.view({UNSIGNED[writer.kernel.registers[name]]})"
            for name, dtype in final
            if dtype[0] in "if" and writer.kernel.registers[name] > 1
        ]
    return steps


def continues_run(first: Instruction, i: Instruction) -> bool:
    """True for an instruction that is written together with the one before it."""
    return tensor_core.begins_run(i) and i.name == first.name


def first_reads(steps: list[Step]) -> set[str]:
    """The registers that a block needs: read before they are written, or written for some threads only."""
    needed, written = set(), set()
    for step in steps:
        needed |= set(step.reads) - written
        if step.guard:
            needed |= set(step.writes) - written
        written |= set(step.writes)
    return needed


def function_source(block: Block, steps: list[Step], loaded: list[str], kept: list[str], index: dict[str, int]) -> str:
    """The Python of a block's function."""
    lines = [f"{name} = R[{index[name]}]" for name in loaded]
    lines += [line for step in steps for line in step.lines]
    if kept:
        lines.append("if M.active is None:")
        lines += [f"    R[{index[name]}] = {name}" for name in kept]
        lines.append("else:")
        lines += [f"    R[{index[name]}] = np.where(M.active, {name}, R[{index[name]}])" for name in kept]
    if block.condition:
        lines.append(f"return {'~' if block.condition.negated else ''}{block.condition.name}")
    body = "\n    ".join(["G, S, L = M.global_memory, M.shared_memory, M.local_memory", *lines])
    return f"def block_{block.index}(M, R):\n    {body}\n"
