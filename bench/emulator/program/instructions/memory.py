"""Loads, stores, atomics, fences and copies. What they do is in `global_memory` and `shared_memory`."""

import re

from ..kinds import SIGNED, UNSIGNED, Kind, is_kind, kind_of
from ..ptx import Address, Instruction, Operand, Register, Sink, Symbol, UnknownPTX, Vector
from ..writer import Writer
from .table import emits, kind_at_end

OBJECTS = {"global": "G", "const": "G", "shared": "S", "local": "L", "generic": "GenericMemory(G, L)"}
ADDRESS_BITS = {"global": 64, "const": 64, "shared": 32, "local": 64, "generic": 64}
ORDERS = ("relaxed", "acquire", "release", "acq_rel", "sc")
SCOPES = ("cta", "cluster", "gpu", "sys")
OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
KNOWN = {
    *("weak", "relaxed", "acquire", "release", "volatile", "nc", "v2", "v4", "v8", *SCOPES),
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt"),  # caches, which change nothing that is computed
}


def space_of(i: Instruction) -> str:
    """The memory of an instruction, "generic" if it names none; an error for the shared memory of another block."""
    spaces = [m.partition("::") for m in i.modifiers if m.split("::")[0] in (*OBJECTS, "param")]
    if not spaces:
        return "generic"
    if any(part == "cluster" for _, _, part in spaces):
        raise UnknownPTX("shared memory of a cluster")
    return spaces[0][0]


def check_modifiers(i: Instruction) -> None:
    """An error for a modifier that is no type, no space and none of KNOWN."""
    for m in i.modifiers:
        head = m.split("::")[0]
        if not (m in KNOWN or head in (*OBJECTS, "param", "L1", "L2") or is_kind(m)):
            raise UnknownPTX(f".{m}")


def listed(items: list[str]) -> str:
    """The Python of a list."""
    return f"[{', '.join(items)}]"


@emits("ld", "ldu")
def emit_load(w: Writer, i: Instruction) -> None:
    """ld of one register or a vector. What is narrower than its register is extended by zeros, or by its sign."""
    check_modifiers(i)
    kind, space = kind_at_end(i), space_of(i)
    if space == "param":
        return emit_parameter(w, i, kind)
    to, source = i.operands[:2]  # a third is a hint for the cache
    destinations = list(to.items) if isinstance(to, Vector) else [to]
    address = w.address(source, ADDRESS_BITS[space])
    call = f"{OBJECTS[space]}.load({i.id}, {address}, {w.guard}, {kind.bits // 8}, {len(destinations)}"
    if all(isinstance(d, Register) and d.bits == kind.bits for d in destinations):
        old = listed([w.old_value(d) for d in destinations]) if i.guard else "None"
        return w.assign_list(destinations, f"{call}, {old})")
    old = f"[{w.constant(0, kind.unsigned)}] * {len(destinations)}" if i.guard else "None"
    parts = [f"loaded_{n}_" for n in range(len(destinations))]
    w.line(f"{listed(parts)} = {call}, {old})")
    for destination, part in zip(destinations, parts):
        if kind.letter == "s":
            w.assign(destination, f"{part}.view({SIGNED[kind.bits]})", kind)
        else:
            w.assign(destination, part, f"b{kind.bits}")


def emit_parameter(w: Writer, i: Instruction, kind: Kind) -> None:
    """ld.param of a number."""
    to, source = i.operands
    symbol = source.base if isinstance(source, Address) else source
    assert isinstance(source, Address)
    if isinstance(symbol, Register) and not source.offset:  # a variable of a call
        return w.assign(to, w.value(symbol, kind), kind)
    types = dict(w.kernel.params)
    if not isinstance(symbol, Symbol) or symbol.name not in types or source.offset:
        raise UnknownPTX("this parameter")
    element, _, count = types[symbol.name].rstrip("]").partition("[")
    bits = kind_of(element).bits * int(count or 1)  # float16 is two bytes
    if bits not in (8, 16, 32, 64):
        raise UnknownPTX("this parameter")
    value = f"M.params[{symbol.name!r}]"
    if bits > kind.bits:
        value = f"{value}.astype({UNSIGNED[kind.bits]})"
    w.assign(
        to,
        f"{value}.view({kind.dtype})" if kind.letter == "s" else value,
        kind if kind.letter == "s" else f"b{kind.bits}",
    )


@emits("st")
def emit_store(w: Writer, i: Instruction) -> None:
    """st of one register or a vector."""
    check_modifiers(i)
    kind, space = kind_at_end(i), space_of(i)
    to, source = i.operands[:2]
    if space == "param":
        if not isinstance(to, Address) or not isinstance(to.base, Register) or to.offset:
            raise UnknownPTX("this parameter")
        return w.assign(to.base, w.value(source, f"b{kind.bits}"), f"b{kind.bits}")
    items = source.items if isinstance(source, Vector) else (source,)
    values = [w.value(item, f"b{kind.bits}") for item in items]
    address = w.address(to, ADDRESS_BITS[space])
    w.line(f"{OBJECTS[space]}.store({i.id}, {address}, {w.guard}, {kind.bits // 8}, {listed(values)})")


@emits("atom", "red")
def emit_atomic(w: Writer, i: Instruction) -> None:
    """atom and red; vectors are updated element by element."""
    kind, space = kind_at_end(i), space_of(i)
    operation = next((m for m in i.modifiers if m in OPERATIONS), None)
    known = {*ORDERS, *SCOPES, *OPERATIONS, "noftz", "v2", "v4", "v8", "v1"}
    unknown = [m for m in i.modifiers if m not in known and m.split("::")[0] not in OBJECTS and not is_kind(m)]
    if unknown or operation is None or space in ("local", "generic"):
        raise UnknownPTX(f".{unknown[0]}" if unknown else "this atomic operation")
    order = next((m for m in i.modifiers if m in ORDERS), "relaxed")
    scope = next((m for m in i.modifiers if m in SCOPES), "gpu")
    to: Operand = Sink()
    operands = list(i.operands)
    if i.opcode == "atom":
        to = operands.pop(0)
    address = w.address(operands[0], ADDRESS_BITS[space])
    destinations = to.items if isinstance(to, Vector) else (to,)
    lists = [x.items if isinstance(x, Vector) else (x,) for x in operands[1:]]
    if operation != "cas" and len(lists) > 1:
        lists = lists[:1]  # what follows is a hint for the cache
    count = len(lists[0])
    for n in range(count):
        at = f"({address} + {w.constant(n * kind.bits // 8, UNSIGNED[ADDRESS_BITS[space]])})" if n else address
        values = listed([w.value(x[n], f"b{kind.bits}") for x in lists])
        d = destinations[n] if len(destinations) == count else Sink()
        old = "None"  # which asks for no result
        if isinstance(d, Register):
            old = w.old_value(d) if i.guard else w.constant(0, kind.unsigned)
        arguments = f"{i.id}, {operation!r}, {kind.text!r}, {at}, {w.guard}, {values}, {old}, {order!r}, {scope!r}"
        call = f"{OBJECTS[space]}.atomic({arguments})"
        if isinstance(d, Register):
            w.assign_list([d], f"[{call}]")
        else:
            w.line(call)


@emits("fence", "membar")
def emit_fence(w: Writer, i: Instruction) -> None:
    """fence and membar, and the fence between memory as threads and as tensor cores see it."""
    if i.guard:
        raise UnknownPTX("a fence under a guard")
    if "proxy" in i.modifiers:
        if i.modifiers[1].split("::")[0] == "async" and i.modifiers[2:] != ("global",):
            return w.line(f"S.proxy_fence({i.id})")
        if i.modifiers[1] == "alias":
            return None
        raise UnknownPTX("this fence")
    if i.opcode == "membar":
        scope = {"cta": "cta", "gl": "gpu", "sys": "sys"}.get(i.modifiers[-1])
        order = "sc"
    else:
        scope = next((m for m in i.modifiers if m in SCOPES), None)
        order = next((m for m in i.modifiers if m in ORDERS), None)
    if scope is None or order is None or "mbarrier_init" in i.modifiers:
        raise UnknownPTX("this fence")
    w.line(f"G.fence({i.id}, {order!r}, {scope!r})")


@emits("cp")
def emit_copy(w: Writer, i: Instruction) -> None:
    """cp.async of 4, 8 or 16 bytes a thread, its groups and waits."""
    if i.modifiers[0] != "async" or "bulk" in i.modifiers or "mbarrier" in i.modifiers:
        raise UnknownPTX("bulk copies and their barriers")
    if i.modifiers[1:] == ("commit_group",):
        return w.line(f"S.commit_copies({i.id})")
    if i.modifiers[1:] == ("wait_group",):
        return w.line(f"S.wait_copies({i.id}, {w.integer(i.operands[0])})")
    if i.modifiers[1:] == ("wait_all",):
        w.line(f"S.commit_copies({i.id})")
        return w.line(f"S.wait_copies({i.id}, 0)")
    if [m.split("::")[0] for m in i.modifiers[1:4]] not in (["ca", "shared", "global"], ["cg", "shared", "global"]):
        raise UnknownPTX("this copy")
    to, source, size = i.operands[:3]
    rest = i.operands[3:]
    if rest and isinstance(rest[0], Register) and rest[0].bits == 1:
        raise UnknownPTX("a copy that a predicate ignores")
    if rest and isinstance(rest[0], Register) and rest[0].bits == 64:
        rest = ()  # a hint for the cache
    part = w.value(rest[0], "u32") if rest else "None"
    w.line(f"S.copy_async({i.id}, {w.address(to, 32)}, {w.address(source, 64)}, {w.guard}, {w.integer(size)}, {part})")


@emits("ldmatrix", "stmatrix")
def emit_matrix(w: Writer, i: Instruction) -> None:
    """ldmatrix and stmatrix of 8 x 8 numbers of 16 bits."""
    count = next((int(m[1]) for m in i.modifiers if re.fullmatch(r"x[124]", m)), None)
    if "m8n8" not in i.modifiers or i.modifiers[-1] != "b16" or count is None:
        raise UnknownPTX("matrices of this shape")
    transposed = "trans" in i.modifiers
    if i.opcode == "ldmatrix":
        if i.guard:
            raise UnknownPTX("ldmatrix under a guard")
        to, source = i.operands
        destinations = list(to.items) if isinstance(to, Vector) else [to]
        return w.assign_list(destinations, f"S.load_matrix({i.id}, {w.address(source, 32)}, {count}, {transposed})")
    values = listed(w.registers(i.operands[1]))
    w.line(f"S.store_matrix({i.id}, {w.address(i.operands[0], 32)}, {w.guard}, {values}, {transposed})")


@emits("prefetch", "prefetchu", "discard", "applypriority")
def emit_nothing(w: Writer, i: Instruction) -> None:
    """Hints for caches."""


@emits("createpolicy")
def emit_policy(w: Writer, i: Instruction) -> None:
    """A hint for caches; its value is never looked at."""
    w.assign(i.operands[0], w.constant(0, "u8"), "b64")
