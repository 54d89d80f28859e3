"""Reads PTX: the text of a kernel becomes basic blocks of instructions.

The first entry of a text is read. Registers get names that are unique in the kernel and valid in Python: `%r12` is
`r12_`, and a register `t` of an inline assembly block is `t_3_`, 3 being the number of its scope.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from .declarations import (
    Function,
    UnknownPTX,
    functions,
    global_variables,
    number_bits,
    parameters,
    shared_variables,
    source_files,
)

LABEL = re.compile(r"([A-Za-z_$%][\w$]*):(?!:)")
GUARDED = re.compile(r"@(!?)\s*(%?[\w$]+) (.*)")
ADDRESS = re.compile(r"\[\s*(.+?)\s*(?:([+-])\s*(-?\w+))?\s*\]")
OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,{\[(])+")
NUMBERED = re.compile(r"%([a-zA-Z_]+)(\d+)")


@dataclass(frozen=True, slots=True)
class Register:
    """bits: 1 for a predicate. negated: written with `!`."""

    name: str
    bits: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Immediate:
    text: str

    @property
    def value(self) -> int:
        """Its bits as an integer."""
        return number_bits(self.text)


@dataclass(frozen=True, slots=True)
class Special:
    """A register that the hardware fills, such as `%tid.x`."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable, or a parameter."""

    name: str


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`"""

    base: "Operand"
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b}`, or the two destinations `a|b`."""

    items: "tuple[Operand, ...]"


@dataclass(frozen=True, slots=True)
class Sink:
    """`_`, a destination that takes nothing."""


Operand = Register | Immediate | Special | Symbol | Address | Vector | Sink


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction as it is written, with where it comes from.

    opcode     the first part of its name, such as `ld`
    modifiers  the other parts, such as ("global", "v4", "b32")
    guard      the predicate in front of it; `negated` for `@!p`
    source     "file:line" of the Python source, the file with its folder where that is known
    callers    "file:line" of the calls, innermost first, if the source was inlined
    """

    id: int
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    source: str
    callers: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))

    @property
    def statement(self) -> str:
        """Its text without the guard."""
        return self.text.split(None, 1)[1] if self.guard else self.text


@dataclass
class Block:
    """Instructions that run one after the other.

    Control goes to `target` if `condition` is None or true, else to the next block; target is None without a branch,
    and END for the end of the kernel.
    """

    index: int
    instructions: list[Instruction] = field(default_factory=list)
    condition: Register | None = None
    target: int | None = None

    def successors(self) -> list[int]:
        """The blocks that may come next."""
        if self.target is None:
            return [self.index + 1]
        after = [self.index + 1] if self.condition else []
        return after + ([self.target] if self.target != END else [])


END = -1


@dataclass
class Kernel:
    """A kernel as it is written.

    params                        (name, type), arrays as "b8[128]"
    registers                     name -> bits, 1 for predicates
    shared_symbols, local_symbols   variables and their addresses
    global_variables              variable -> its bytes
    """

    name: str
    params: list[tuple[str, str]]
    threads: int
    registers: dict[str, int]
    blocks: list[Block]
    shared_symbols: dict[str, int]
    local_symbols: dict[str, int]
    local_bytes: int
    global_variables: dict[str, bytes]


def parse(text: str) -> Kernel:
    """The first kernel of a PTX text."""
    entry = re.search(r"\.entry\s+([\w$]+)", text)
    if not entry:
        raise UnknownPTX("no kernel (.entry) in this PTX")
    opening = text.index("{", entry.end())
    heading = text[entry.end() : opening]
    params = re.search(r"\((.*?)\)", heading, re.DOTALL)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", heading)
    count = 0
    if threads:
        count = 1
        for n in threads[1].split(","):
            count *= int(n)
    reader = _Reader(entry[1], source_files(text), shared_variables(text[: entry.start()]), functions(text))
    reader.read(text[opening + 1 :])
    return Kernel(
        name=entry[1],
        params=parameters(params[1] if params else ""),
        threads=count,
        registers=reader.registers,
        blocks=reader.finished_blocks(),
        shared_symbols=reader.shared_symbols,
        local_symbols=reader.local_symbols,
        local_bytes=reader.local_bytes,
        global_variables=global_variables(text),
    )


class _Reader:
    """Reads the body of a kernel, a statement after the other."""

    def __init__(
        self, kernel: str, files: dict[str, str], shared_symbols: dict[str, int], functions: dict[str, Function]
    ):
        self.kernel, self.files, self.shared_symbols, self.functions = kernel, files, shared_symbols, functions
        self.folders = {Path(file).name: file for file in files.values()}
        self.registers: dict[str, int] = {}
        self.local_symbols: dict[str, int] = {}
        self.local_bytes = 0
        self.blocks = [Block(0)]
        self.source, self.callers = "", ()
        self.instructions = 0
        self.scopes: list[dict[str, Register]] = [{}]
        self.families: dict[str, int] = {}  # of %r<100>: "r" -> 32
        self.calls: list[str] = []  # the functions that are being read, and a suffix for the registers of the last
        self.suffix = ""
        self.labels: list[dict[str, int]] = [{}]  # of the open scopes
        self.branches: list[list[tuple[Block, str]]] = [[]]
        self.scope_count = 0
        self.operands: dict[str, Operand] = {}

    def read(self, text: str) -> None:
        buffer = ""
        for line in text.splitlines():
            code, _, comment = line.partition("//")
            code = code.strip()
            if code.split(None, 1)[:1] == [".loc"]:
                self.locate(code, comment)
                continue
            buffer += " " + code
            while (rest := self.statement_of(buffer.lstrip())) is not None:
                buffer = rest
            if not self.scopes:
                return

    def statement_of(self, text: str) -> str | None:
        """Takes the statement that a text begins with, and returns the rest; None if it is not there in full."""
        if text.startswith("{"):
            self.scopes.append({})
            self.labels.append({})
            self.branches.append([])
            self.scope_count += 1
            return text[1:]
        if text.startswith("}"):
            self.close_scope()
            return text[1:] if self.scopes else None
        if label := LABEL.match(text):
            if not label[1].startswith(("$L__tmp", "$L__func")):
                if self.blocks[-1].instructions:
                    self.blocks.append(Block(len(self.blocks)))
                self.labels[-1][label[1]] = self.blocks[-1].index
            return text[label.end() :]
        statement, semicolon, rest = text.partition(";")
        if not semicolon:
            return None
        statement = " ".join(statement.split())
        if statement.startswith("."):
            self.directive(statement)
        elif statement:
            self.instruction(statement)
        return rest

    def close_scope(self) -> None:
        labels = self.labels.pop()
        for block, label in self.branches.pop():
            if label in labels:
                block.target = labels[label]
            elif self.branches:
                self.branches[-1].append((block, label))
            else:
                raise UnknownPTX(f"{self.kernel}: no label {label}")
        self.scopes.pop()

    def locate(self, code: str, comment: str) -> None:
        _, number, line, *_ = code.split()
        self.source = f"{self.files.get(number, number)}:{line}"
        calls = re.findall(r"@\[ ([^\s:]+):(\d+)", comment)
        self.callers = tuple(f"{self.folders.get(file, file)}:{line}" for file, line in calls)

    def directive(self, text: str) -> None:
        if declared := re.match(r"\.reg \.(\w+) (.*)", text):
            bits = 1 if declared[1] == "pred" else int(re.sub(r"\D", "", declared[1]))
            for name in map(str.strip, declared[2].split(",")):
                family = re.fullmatch(r"(%?)([\w$]+)<(\d+)>", name)
                if family and family[1]:
                    self.families[family[2]] = bits
                elif family:
                    for n in range(int(family[3])):
                        self.declare(f"{family[2]}{n}", bits)
                else:
                    self.declare(name, bits)
        elif local := re.match(r"\.local \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", text):
            start = -(-self.local_bytes // int(local[1])) * int(local[1])
            self.local_symbols[local[2]] = start
            self.local_bytes = start + int(local[3])
        elif param := re.match(r"\.param (?:\.align \d+ )?\.[bsuf](\d+) ([\w$]+)$", text):
            self.declare(param[2], max(16, int(param[1])))
        elif not text.startswith((".pragma", ".param", ".callprototype", ".noreturn")):
            raise UnknownPTX(f"this is not emulated: {text} ({self.kernel}, {self.source})")

    def declare(self, name: str, bits: int) -> None:
        python = re.sub(r"\W", "", name)
        python = f"{python}_{self.scope_count}_" if len(self.scopes) > 1 else f"{python}_"
        self.registers[python] = bits
        self.scopes[-1][name] = Register(python, bits)

    def instruction(self, text: str) -> None:
        guard, statement = None, text
        if guarded := GUARDED.match(text):
            register = self.operand(guarded[2])
            assert isinstance(register, Register)
            guard, statement = Register(register.name, register.bits, bool(guarded[1])), guarded[3]
        name, _, rest = statement.partition(" ")
        opcode, *modifiers = name.split(".")
        block = self.blocks[-1]
        operands: tuple[Operand, ...] = ()
        if opcode == "ret" and self.calls:
            opcode, modifiers, rest = "bra", [], self.suffix
        if opcode == "bra":
            self.branches[-1].append((block, rest.strip()))
        elif opcode == "call" and guard is None:
            return self.call(text)
        elif opcode in ("call", "brx"):
            raise UnknownPTX(f"this is not emulated: {text} ({self.kernel}, {self.source})")
        else:
            operands = tuple(self.operand(part) for part in split_operands(rest))
        block.instructions.append(
            Instruction(
                self.instructions, opcode, tuple(modifiers), operands, guard, self.source, self.callers, f"{text};"
            )
        )
        self.instructions += 1
        if opcode in ("bra", "ret", "exit"):
            block.condition, block.target = guard, END
            self.blocks.append(Block(len(self.blocks)))

    def call(self, text: str) -> None:
        """Reads the function that is called in the place of the call, its parameters being the caller's variables."""
        parts = re.match(r"call(?:\.uni)? (?:\(([^)]*)\), )?([\w$]+)(?:, \(([^)]*)\))?$", text)
        function = self.functions.get(parts[2]) if parts else None
        if not parts or function is None or parts[2] in self.calls:
            raise UnknownPTX(f"this is not emulated: {text} ({self.kernel}, {self.source})")
        given = [self.operand(name) for names in (parts[1], parts[3]) for name in split_operands(names or "")]
        taken = [*function.results, *function.params]
        outside = self.families, self.suffix, self.source, self.callers
        self.scope_count += 1
        self.families, self.suffix = {}, f"call_{self.scope_count}_"
        self.calls.append(parts[2])
        self.statement_of("{")
        self.scopes[-1].update({name: x for name, x in zip(taken, given, strict=True) if isinstance(x, Register)})
        self.read(function.body)
        self.statement_of(f"{self.suffix}: ")
        self.close_scope()
        self.calls.pop()
        self.families, self.suffix, self.source, self.callers = outside

    def operand(self, text: str) -> Operand:
        """An operand; those outside of inline assembly mean the same wherever they stand."""
        if len(self.scopes) > 1:
            return self.new_operand(text)
        if text not in self.operands:
            self.operands[text] = self.new_operand(text)
        return self.operands[text]

    def new_operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self.operand(part) for part in split_operands(text.strip("{} "))))
        if text.startswith("["):
            inner = ADDRESS.fullmatch(text)
            if not inner:
                raise UnknownPTX(f"address {text} ({self.kernel}, {self.source})")
            offset = int(inner[3], 0) * (-1 if inner[2] == "-" else 1) if inner[3] else 0
            return Address(self.operand(inner[1]), offset)
        if "|" in text:
            return Vector(tuple(self.operand(part.strip()) for part in text.split("|")))
        if text.startswith("!"):
            register = self.operand(text[1:].strip())
            assert isinstance(register, Register)
            return Register(register.name, register.bits, True)
        if text == "_":
            return Sink()
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if (numbered := NUMBERED.fullmatch(text)) and numbered[1] in self.families:
            register = Register(f"{numbered[1]}{numbered[2]}_{self.suffix}", self.families[numbered[1]])
            self.registers[register.name] = register.bits
            return register
        if text.startswith("%"):
            return Special(text)
        if re.match(r"[-\d]", text):
            return Immediate(text)
        return Symbol(text)

    def finished_blocks(self) -> list[Block]:
        if self.scopes:
            raise UnknownPTX(f"{self.kernel}: its text ends before its last brace")
        if self.blocks[-1].target is None:
            self.blocks[-1].target = END
        return self.blocks


def split_operands(text: str) -> list[str]:
    """The operands of a list, which has commas inside of braces and brackets too."""
    return [part.strip() for part in OPERAND.findall(text)]
