"""Facts that the instructions of a kernel tell of its accesses to memory before it runs."""

import re
from collections.abc import Iterable
from typing import NamedTuple

REGISTER = re.compile(r"(?<![\w.$])%?[A-Za-z_$][\w$]*(?:\.[xyz])?")
MEMORY = "a value loaded from memory"
LOAD = re.compile(r"ld\.global\.b\d+\s+(?P<to>%\w+), (?P<place>\[[^\]]*\])")
SWAP = re.compile(r"atom\.\S*global\S*\.cas\.b\d+\s+%\w+, (?P<place>\[[^\]]*\]), (?P<compared>%\w+),")
COPY = re.compile(r"mov\.\w+\s+(?P<to>%\w+), (?P<source>%\w+)")


class MemoryFacts(NamedTuple):
    """shared_unit, global_unit: bytes, at most 16, that every access to that memory is a multiple of.

    written: the parameters from which addresses of stores and atomics can derive; None: any.
    releases: if there are instructions that order the memory accesses of blocks, and others that they can order.
    guesses: the numbers of loads whose value a compare-and-swap at the same address checks.
    """

    shared_unit: int
    global_unit: int
    written: frozenset[str] | None
    releases: bool
    guesses: frozenset[int]


def memory_facts(statements: Iterable[str]) -> MemoryFacts:
    """The facts of a kernel, from its instructions without their guards."""
    texts = list(statements)
    written = written_parameters(texts)
    opcodes = [set(text.split(None, 1)[0].split(".")) for text in texts]
    orders = any(
        x & {"acquire", "release", "acq_rel", "membar"} or ("fence" in x and x & {"gpu", "sys"}) for x in opcodes
    )
    plain = any(x >= {"st", "global"} for x in opcodes)
    facts = shared_unit(texts), global_unit(texts), None if written is None else frozenset(written)
    return MemoryFacts(*facts, orders and plain, frozenset(guesses(texts)))


def shared_unit(texts: Iterable[str]) -> int:
    """The bytes, at most 16, that every access to shared memory by these instructions is a multiple of."""
    least = 16
    for text in texts:
        opcode = text.split(None, 1)[0].split(".")
        if opcode[0] in ("ld", "st", "atom", "red") and any(part.split("::")[0] == "shared" for part in opcode):
            bits = [int(m[1]) for part in opcode if (m := re.fullmatch(r"[bsuf]f?(8|16|32|64|128)(?:x2)?", part))]
            width = max(1, (min(bits) if bits else 8) // 8)
            vector = next((int(part[1]) for part in opcode if part in ("v2", "v4")), 1)
            least = min(least, width * vector)
        elif opcode[:2] == ["cp", "async"] and "shared" in text and "bulk" not in opcode:
            least = min(least, int(text.rstrip("; ").split("]")[-1].split(",")[1].strip(), 0))
    return least


def global_unit(texts: Iterable[str]) -> int:
    """The bytes, at most 16, that every access to global memory by these instructions is a multiple of."""
    least = 16
    for text in texts:
        opcode = text.split(None, 1)[0].split(".")
        elsewhere = any(part.split("::")[0] in ("shared", "local", "param") for part in opcode)
        if (opcode[0] in ("ld", "st", "atom", "red") and not elsewhere) or opcode[:2] == ["cp", "async"]:
            bits = [int(m[1]) for part in opcode if (m := re.fullmatch(r"[bsuf]f?(8|16|32|64|128)", part))]
            least = min(least, (min(bits) if bits else 32) // 8)
    return least


def written_parameters(texts: Iterable[str]) -> set[str] | None:
    """The parameters from which addresses of stores and atomics can derive; None: any, as one was loaded from memory,
    or passed to a function.

    Every register derives from all that an instruction reads which writes it, wherever it stands.
    """
    sources: dict[str, set[str]] = {}
    stored: set[str] = set()
    for text in texts:
        opcode, _, rest = text.rstrip("; ").partition(" ")
        kind = opcode.split(".")[0]
        if opcode.startswith("st.param"):  # of a function, which may write wherever it likes
            return None
        if kind in ("st", "red", "atom") and "shared" not in opcode:
            stored |= set(REGISTER.findall(rest[rest.index("[") : rest.index("]")]))
        if kind in ("st", "red", "bra", "bar", "cp", "ret") or not rest:
            continue
        end = rest.index("}") + 1 if rest.startswith("{") else rest.find(",") if "," in rest else len(rest)
        read = set(REGISTER.findall(rest[end:]))
        if kind == "ld" and "param" not in opcode:
            read = {MEMORY} if opcode.endswith("64") else set()  # fewer bits are no address
        for name in REGISTER.findall(rest[:end]):
            sources.setdefault(name, set()).update(read)
    found, todo = set(), list(stored)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += sources.get(name, ())
    return None if MEMORY in found else {name for name in found if "_param_" in name}


def guesses(texts: Iterable[str]) -> set[int]:
    """The loads, by number, whose value a compare-and-swap at the same address checks, as it was loaded or copied.

    Compilers make a loop that begins with such a load of an atomic operation that the GPU lacks: sums of bfloat16
    before sm_90. Another block may write there meanwhile.
    """
    texts = list(texts)
    swaps = [swap for text in texts if (swap := SWAP.match(text))]
    copies: dict[str, set[str]] = {}
    for text in texts if swaps else ():
        if copy := COPY.match(text):
            copies.setdefault(copy["to"], {copy["to"]}).add(copy["source"])
    compared = {(swap["place"], name) for swap in swaps for name in copies.get(swap["compared"], {swap["compared"]})}
    loads = ((n, LOAD.match(text)) for n, text in enumerate(texts))
    return {n for n, load in loads if load and (load["place"], load["to"]) in compared}
