"""Writes Python for the instructions of a kernel: operands as expressions, results as assignments to local variables.

A variable has the name of its register and holds, while a block runs, an array of the type of its last result: what is
computed as float32 and used as float32 is never looked at as bits. `Writer.held` knows that type; at the end of a block
every register is unsigned again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .kinds import SIGNED, UNSIGNED, Kind, kind_of
from .ptx import Address, Immediate, Instruction, Kernel, Operand, Register, Sink, Special, Symbol, UnknownPTX, Vector

NUMPY = {
    **{"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64},
    **{"i1": np.int8, "i2": np.int16, "i4": np.int32, "i8": np.int64},
    **{"f2": np.float16, "f4": np.float32, "f8": np.float64},
}
SPECIAL = {  # of one dimension or none -> expression
    "%laneid": "M.lane",
    "%warpid": "M.warp",
    "%nwarpid": "u4_([[M.warps]])",
    "%smid": "M.multiprocessor",
    "%lanemask_eq": "(u4_([[1]]) << M.lane)",
    "%lanemask_lt": "((u4_([[1]]) << M.lane) - u4_([[1]]))",
    "%lanemask_le": "(((u4_([[1]]) << M.lane) << u4_([[1]])) - u4_([[1]]))",
    "%lanemask_gt": "~(((u4_([[1]]) << M.lane) << u4_([[1]])) - u4_([[1]]))",
    "%lanemask_ge": "~((u4_([[1]]) << M.lane) - u4_([[1]]))",
    "%clock": "u4_([[M.clock()]])",
    "%clock_hi": "u4_([[0]])",
    "%clock64": "u8_([[M.clock()]])",
    "%globaltimer": "u8_([[M.clock()]])",
    "%globaltimer_lo": "u4_([[M.clock()]])",
    "%cluster_ctarank": "u4_([[0]])",
    "%cluster_nctarank": "u4_([[1]])",
    "%is_explicit_cluster": "np.array([[False]])",
    "%dynamic_smem_size": "u4_([[M.shared_bytes]])",
    "%total_smem_size": "u4_([[M.shared_bytes]])",
    "%gridid": "u8_([[0]])",
}
SPECIAL_OF_AXIS = {  # a cluster is one block
    "%tid": ("M.tid", "u4_([[0]])", "u4_([[0]])"),
    "%ntid": ("u4_([[M.threads]])", "u4_([[1]])", "u4_([[1]])"),
    "%ctaid": ("M.ctaid[0]", "M.ctaid[1]", "M.ctaid[2]"),
    "%nctaid": ("u4_([[M.grid[0]]])", "u4_([[M.grid[1]]])", "u4_([[M.grid[2]]])"),
    "%clusterid": ("M.ctaid[0]", "M.ctaid[1]", "M.ctaid[2]"),
    "%nclusterid": ("u4_([[M.grid[0]]])", "u4_([[M.grid[1]]])", "u4_([[M.grid[2]]])"),
    "%cluster_ctaid": ("u4_([[0]])",) * 3,
    "%cluster_nctaid": ("u4_([[1]])",) * 3,
}


@dataclass
class Step:
    """The Python of an instruction.

    reads, writes  names of registers; a write under a guard leaves some threads as they were
    accumulators  registers that are being computed until a wait, among the writes
    sources       registers that are being read until a wait, among the reads
    copies        destination -> source, where nothing is computed
    waits         of a wait for wgmma, how many groups it leaves
    used_where    register -> expression for the threads in which its value matters, where that is not the guard
    choice        condition and the two registers of which it takes one
    spread        where values move between threads: a format for the same move of a predicate
    """

    instruction: Instruction
    lines: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    accumulators: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    waits: int | None = None
    used_where: dict[str, str] = field(default_factory=dict)
    choice: tuple[str, str, str] | None = None
    spread: str = ""
    guard: str | None = None  # an expression


class Writer:
    """space: the names that the code will find, to which constants are added. addresses: of global variables."""

    def __init__(self, kernel: Kernel, space: dict, addresses: dict[str, int]):
        self.kernel, self.space, self.addresses = kernel, space, addresses
        self.held: dict[str, str] = {}
        self.step: Step

    def start_block(self) -> None:
        self.held = {}

    def start(self, instruction: Instruction) -> Step:
        """Begins the step of an instruction."""
        self.step = Step(instruction)
        if instruction.guard:
            self.step.guard = self.predicate(instruction.guard)
        return self.step

    def line(self, text: str) -> None:
        self.step.lines.append(text)

    # ---- operands

    def constant(self, value: int, dtype: str) -> str:
        """The name of an array [1, 1] of the type whose bits are the value's."""
        size = int(dtype[1])
        bits = value & (2 ** (8 * size) - 1)
        name = f"{dtype}_{bits:x}"
        if name not in self.space:
            self.space[name] = np.array([[bits]], NUMPY[f"u{size}"]).view(NUMPY[dtype])
        return name

    def share(self, value: object, prefix: str) -> str:
        """The name by which code finds an object."""
        name = f"{prefix}_{len(self.space)}"
        self.space[name] = value
        return name

    @staticmethod
    def integer(operand: Operand) -> int | None:
        """The value of a number in the text, None for a register."""
        return operand.value if isinstance(operand, Immediate) else None

    def predicate(self, operand: Operand) -> str:
        if isinstance(operand, Immediate):
            return f"np.array([[{bool(operand.value)}]])"
        if isinstance(operand, Register) and operand.bits == 1:
            self.step.reads.append(operand.name)
            return f"~{operand.name}" if operand.negated else operand.name
        raise UnknownPTX(f"{operand} as a predicate")

    def value(self, operand: Operand, kind: Kind | str) -> str:
        """An expression for an operand in the numpy type of its kind; of a wider register the low bits."""
        kind = kind_of(kind) if isinstance(kind, str) else kind
        if kind.letter == "pred":
            return self.predicate(operand)
        dtype = kind.dtype
        if isinstance(operand, Immediate):
            if kind.text == "f64" and operand.text[:2].lower() != "0d":
                raise UnknownPTX(f"{operand.text} as f64")
            return self.constant(operand.value, dtype)
        if isinstance(operand, Symbol):
            return self.constant(self.symbol(operand.name), dtype)
        if isinstance(operand, Special):
            expression, bits, held = self.special(operand.name), 32, "u4"
            if operand.name in ("%clock64", "%globaltimer", "%gridid"):
                bits, held = 64, "u8"
        elif isinstance(operand, Register):
            self.step.reads.append(operand.name)
            bits = operand.bits
            held = self.held.get(operand.name, UNSIGNED.get(bits, "bool"))
            expression = operand.name
        else:
            raise UnknownPTX(f"operand {operand}")
        if bits < kind.bits:
            raise UnknownPTX(f"an operand of {bits} bits as {kind.text}")
        if bits > kind.bits:
            expression, held = f"{self.viewed(expression, held, UNSIGNED[bits])}.astype({kind.unsigned})", kind.unsigned
        return self.viewed(expression, held, dtype)

    @staticmethod
    def viewed(expression: str, held: str, dtype: str) -> str:
        return expression if held == dtype else f"{expression}.view({dtype})"

    def special(self, name: str) -> str:
        if name in SPECIAL:
            return SPECIAL[name]
        register, _, axis = name.partition(".")
        if register in SPECIAL_OF_AXIS and axis in ("x", "y", "z"):
            return SPECIAL_OF_AXIS[register]["xyz".index(axis)]
        raise UnknownPTX(f"special register {name}")

    def symbol(self, name: str) -> int:
        symbols = self.kernel.shared_symbols | self.kernel.local_symbols | self.addresses
        if name not in symbols:
            raise UnknownPTX(f"variable {name}")
        return symbols[name]

    def address(self, operand: Operand, bits: int) -> str:
        """An unsigned expression for `[base + offset]`."""
        if not isinstance(operand, Address):
            raise UnknownPTX(f"address {operand}")
        if isinstance(operand.base, Register) and operand.base.bits in (32, 64):  # of which hardware takes either
            base = self.value(operand.base, f"u{operand.base.bits}")
            base = base if operand.base.bits == bits else f"{base}.astype(u{bits // 8})"
        else:
            base = self.value(operand.base, f"u{bits}")
        return f"({base} + {self.constant(operand.offset, f'u{bits // 8}')})" if operand.offset else base

    @property
    def guard(self) -> str:
        """The guard as the mask of a call: an expression, or "None"."""
        return self.step.guard or "None"

    # ---- results

    def assign(self, destination: Operand, expression: str, kind: Kind | str) -> None:
        """Gives a register the value of an expression of its kind; a wider register is filled by its sign."""
        kind = kind_of(kind) if isinstance(kind, str) else kind
        if isinstance(destination, Sink):
            return
        if not isinstance(destination, Register):
            raise UnknownPTX(f"destination {destination}")
        name, bits = destination.name, destination.bits
        dtype = kind.dtype
        if bits < kind.bits:
            raise UnknownPTX(f"{kind.text} into a register of {bits} bits")
        if bits > kind.bits:
            if kind.letter == "pred":
                raise UnknownPTX(f"a predicate into a register of {bits} bits")
            if not kind.is_float and kind.letter != "s":
                expression, dtype = f"({expression}).astype({UNSIGNED[bits]})", UNSIGNED[bits]
            elif kind.letter == "s":
                expression, dtype = f"({expression}).astype({SIGNED[bits]})", SIGNED[bits]
            else:
                expression = f"({expression}).view({kind.unsigned}).astype({UNSIGNED[bits]})"
                dtype = UNSIGNED[bits]
        if self.step.guard:
            old = self.viewed(name, self.held.get(name, UNSIGNED.get(bits, "bool")), dtype)
            expression = f"np.where({self.step.guard}, {expression}, {old})"
        self.line(f"{name} = {expression}")
        self.held[name] = dtype
        self.step.writes.append(name)

    def registers(self, operand: Operand, bits: int = 32) -> list[str]:
        """Unsigned expressions for the registers of a vector, all of these bits."""
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return [self.unsigned(item, bits) for item in items]

    def unsigned(self, operand: Operand, bits: int) -> str:
        """An unsigned expression for an operand of exactly these bits."""
        if isinstance(operand, Register) and operand.bits != bits:
            raise UnknownPTX(f"a register of {operand.bits} bits, not {bits}")
        return self.value(operand, f"b{bits}")

    def old_value(self, operand: Operand) -> str:
        """An unsigned expression for what a register holds in threads that a guard masks off: no read of it."""
        assert isinstance(operand, Register)
        unsigned = UNSIGNED[operand.bits]
        return self.viewed(operand.name, self.held.get(operand.name, unsigned), unsigned)

    def assign_list(self, destinations: Sequence[Operand], expression: str) -> None:
        """Gives registers the unsigned arrays of a list; the expression has taken care of the guard."""
        names = []
        for destination in destinations:
            if isinstance(destination, Sink):
                names.append("_")
                continue
            assert isinstance(destination, Register)
            names.append(destination.name)
            self.held[destination.name] = UNSIGNED[destination.bits]
            self.step.writes.append(destination.name)
        self.line(f"[{', '.join(names)}] = {expression}")
