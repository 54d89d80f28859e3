"""Each config beside another library's kernel, compiled in the same run for the same sizes and with the same tile."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vila_triton.registry import OPS

from ..compiled import Call
from ..measure.format import brief
from .inspect_text import Found, aligned, words
from .production_sizes import production

Row = Mapping[str, Any]


def calls(ours: Sequence[Call]) -> dict[int, Call]:
    """Calls of the peer that configs/bench/inspect.toml names, by the place of the call of ours they go with.

    None for a config without BLOCK_M: that is no tile of a product.
    """
    found = {}
    for i, call in enumerate(ours):
        impls = OPS[call.op].impls
        peer, impl = production(OPS[call.op], "", {}).beside, impls[call.impl]
        config = impl.configs[call.config] if isinstance(call.config, int) else call.config
        if peer in impls and "BLOCK_M" in config and not impl.fn.__module__.startswith("bench."):
            found[i] = Call(call.op, peer, config, call.target, call.sizes)
    return found


def table(ours: Sequence[Found], theirs: Mapping[int, Found], unusable: Mapping[str, str]) -> Iterator[str]:
    """Two lines a config, and where ours issues more instructions for a weight than theirs, all rows of x together: a
    tile of fewer rows makes a number of every weight so many times as often.
    """
    call = ours[0].call
    peer = production(OPS[call.op], "", {}).beside or ""
    if peer in unusable:
        yield f"beside {peer}: not compared, it is not here: {unusable[peer]}"
    if not theirs:
        return
    yield f"beside {peer}, at the same sizes and tile (the tile is what was compiled):"
    head = ["", "m", "tile", "registers", "spills", "shared", "weight loads", "tensor core", "of the main loop", "ours"]
    lines, ratios = [head], {}
    without: dict[str, list[str]] = {}
    for i, other in theirs.items():
        mine, its = work(ours[i]), work(other)
        if mine is None or its is None:
            why = (ours[i] if mine is None else other).outcome
            reason = why.error or why.unsupported or "launches no Triton kernel"
            without.setdefault(reason.splitlines()[0], []).append(ours[i].name)
            continue
        ratio = "?"
        if mine["per_unit"] and its["per_unit"]:
            a, b = (row["per_unit"] * passes(row) for row in (mine, its))
            ratios[ours[i].name], ratio = (a, b), f"{a / b:.2f} of it"
        lines += [[ours[i].name, *cells(mine), ratio], [f"  {its['kernel']}", *cells(its), ""]]
    yield from aligned(lines)
    yield from (f"not compared: {', '.join(names)}: {reason}" for reason, names in without.items())
    more = {name: pair for name, pair in ratios.items() if pair[0] >= pair[1]}
    yield f"instructions a weight: ours needs fewer in {len(ratios) - len(more)} of {len(ratios)}"
    for name, (a, b) in more.items():
        yield f"  not fewer in {name}: {a:.2f}, {peer} {b:.2f}"


def work(found: Found) -> Row | None:
    """The kernel that reads the weights, of those a call launches."""
    return next((row for row in found.rows if row["per_unit"]), next(iter(found.rows), None))


def passes(row: Row) -> int:
    """How often every weight is made a number of."""
    return -(-row["sizes"]["m"] // row["tile"].get("BLOCK_M", row["sizes"]["m"]))


def cells(row: Row) -> list[Any]:
    loop = row["loops"][0]
    shared = "" if loop["weight_bytes"] or not loop["weight_loads"] else " (and x)"
    often = f" x {passes(row)}" if passes(row) > 1 else ""
    each = f"{row['per_unit']:.2f}{often} a {row['unit']}" if row["per_unit"] else "?"
    takes = [row["registers"], row["spills"], row["shared"]]
    loads = words(loop["weight_loads"]) + shared
    whole = " (no loop)" if loop["whole"] else ""
    return [row["sizes"]["m"], brief(row["tile"]), *takes, loads, words(loop["tensor"]), each + whole]
