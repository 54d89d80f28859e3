"""Each config beside another library's kernel, compiled in the same run for the same sizes and with the same tile."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vila_triton.registry import OPS

from ..measure.format import format_config
from .cross_compile import CompileRequest
from .inspect_text import InspectedCall, format_counts, format_table
from .production_sizes import compile_spec

Row = Mapping[str, Any]


def peer_requests(requests: Sequence[CompileRequest]) -> dict[int, CompileRequest]:
    """Returns requests for the peer that configs/bench/inspect.toml names, by the index of the request they go with. A
    config without BLOCK_M has none: it is no tile of a matrix product.
    """
    by_index = {}
    for i, request in enumerate(requests):
        impls = OPS[request.op].impls
        peer, impl = compile_spec(OPS[request.op], "", {}).peer, impls[request.impl]
        config = impl.configs[request.config] if isinstance(request.config, int) else request.config
        if peer in impls and "BLOCK_M" in config and not impl.fn.__module__.startswith("bench."):
            by_index[i] = CompileRequest(request.op, peer, config, request.target, request.sizes)
    return by_index


def peer_table(
    inspected: Sequence[InspectedCall], inspected_peers: Mapping[int, InspectedCall], unusable: Mapping[str, str]
) -> Iterator[str]:
    """Yields two lines per config, and where our kernel issues more instructions per weight than the peer's.
    Instructions are counted for all rows of x: a tile of fewer rows dequantizes every weight more often.
    """
    request = inspected[0].request
    peer = compile_spec(OPS[request.op], "", {}).peer or ""
    if peer in unusable:
        yield f"beside {peer}: not compared, it is not here: {unusable[peer]}"
    if not inspected_peers:
        return
    yield f"beside {peer}, at the same sizes and tile (the tile is what was compiled):"
    head = ["", "m", "tile", "registers", "spills", "shared", "weight loads", "tensor core", "of the main loop", "ours"]
    lines, ratios = [head], {}
    not_compared: dict[str, list[str]] = {}
    for i, peer_call in inspected_peers.items():
        own_row, peer_row = weight_kernel_row(inspected[i]), weight_kernel_row(peer_call)
        if own_row is None or peer_row is None:
            result = (inspected[i] if own_row is None else peer_call).result
            reason = result.error or result.unsupported or "launches no Triton kernel"
            not_compared.setdefault(reason.splitlines()[0], []).append(inspected[i].name)
            continue
        ratio = "?"
        if own_row["per_unit"] and peer_row["per_unit"]:
            a, b = (row["per_unit"] * dequant_passes(row) for row in (own_row, peer_row))
            ratios[inspected[i].name], ratio = (a, b), f"{a / b:.2f} of it"
        lines += [
            [inspected[i].name, *format_cells(own_row), ratio],
            [f"  {peer_row['kernel']}", *format_cells(peer_row), ""],
        ]
    yield from format_table(lines)
    yield from (f"not compared: {', '.join(names)}: {reason}" for reason, names in not_compared.items())
    slower = {name: pair for name, pair in ratios.items() if pair[0] >= pair[1]}
    yield f"instructions a weight: ours needs fewer in {len(ratios) - len(slower)} of {len(ratios)}"
    for name, (a, b) in slower.items():
        yield f"  not fewer in {name}: {a:.2f}, {peer} {b:.2f}"


def weight_kernel_row(inspected: InspectedCall) -> Row | None:
    """Returns the row of the kernel that reads the weights, of those that a call launches."""
    return next((row for row in inspected.rows if row["per_unit"]), next(iter(inspected.rows), None))


def dequant_passes(row: Row) -> int:
    """Returns the times that a call dequantizes each weight: once per block of BLOCK_M rows of x."""
    return -(-row["sizes"]["m"] // row["tile"].get("BLOCK_M", row["sizes"]["m"]))


def format_cells(row: Row) -> list[Any]:
    """Returns the cells of one kernel."""
    loop = row["loops"][0]
    shared = "" if loop["weight_bytes"] or not loop["weight_loads"] else " (and x)"
    repeats = f" x {dequant_passes(row)}" if dequant_passes(row) > 1 else ""
    per_unit = f"{row['per_unit']:.2f}{repeats} a {row['unit']}" if row["per_unit"] else "?"
    usage = [row["registers"], row["spills"], row["shared"]]
    loads = format_counts(loop["weight_loads"]) + shared
    remark = " (no loop)" if loop["whole"] else ""
    return [
        row["sizes"]["m"],
        format_config(row["tile"]),
        *usage,
        loads,
        format_counts(loop["tensor"]),
        per_unit + remark,
    ]
