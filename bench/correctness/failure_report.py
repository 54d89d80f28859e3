"""A failure in words and as a map of its errors, the way `check` prints it; and what is to be done after one."""

import gc
import math
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.registry import Impl, Unsupported

from .error_budget import excess
from .guarded_memory import Unfaithful

ROWS, COLUMNS = 24, 100  # of characters
TILE = 16
LEGEND = f"{'':15}. is within the budget, 1 up to 10 times it, 2 up to 100 times, ...; # NaN, infinite or a wrong bit"


def line(head: str) -> str:
    """The left column of a report."""
    return f"  {head:13}"


def settings(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def described(error: Exception, impl: Impl, config: Mapping[str, Any]) -> list[str]:
    """Lines: what failed and, where a tensor is wrong, `elements`; of a crash the exception and where it arose."""
    if not isinstance(error, Unfaithful):
        return [f"{line('what failed')}crashed: {crash(error)}", *(f"{line('')}at {x}" for x in places(error, impl))]
    return [f"{line('what failed')}{error.kind}: {error}", *elements(error, config), *([LEGEND] if error.where else [])]


def elements(error: Exception, config: Mapping[str, Any]) -> list[str]:
    """Lines: the first wrong element and the error map; none where no tensor is wrong."""
    if not isinstance(error, Unfaithful) or error.got is None or error.want is None:
        return []
    times = excess(error.got, error.want, error.allowed)
    unit, rows = error_map(times, (config.get("BLOCK_M", TILE), config.get("BLOCK_N", TILE)))
    return [
        f"{line('first wrong')}{first_wrong(error, times)}",
        f"{line('error map')}{error.where} {list(error.got.shape)}; {unit}",
        *(f"{line('')}{row}" for row in rows),
    ]


def crash(error: Exception) -> str:
    """The exception in one line; if the interpreter wrapped another in it, that one."""
    inner = error.__cause__ or error
    return f"{type(inner).__name__}: {inner}".splitlines()[0]


def refusal(error: Exception) -> str:
    """Why something got no time, in one line."""
    return f"unsupported: {error}" if isinstance(error, Unsupported) else crash(error)


def release(device: torch.device) -> None:
    """After a failure: give back what it left allocated, which is not before its traceback is gone, so not while it is
    handled. Errors: RuntimeError if the failure broke the CUDA context, so that nothing after it would be true.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def places(error: BaseException, impl: Impl) -> list[str]:
    """The lines of the implementation's own file that were running, outermost first."""
    frames = [f for e in (error, error.__cause__) if e for f in traceback.extract_tb(e.__traceback__)]
    return [f"{impl.file.name}:{f.lineno}  {f.line}" for f in frames if Path(f.filename).resolve() == impl.file]


def first_wrong(error: Unfaithful, times: Tensor) -> str:
    """The first element, in the order of its index, that is off."""
    assert error.got is not None and error.want is not None
    at = tuple((times > 1).nonzero()[0].tolist())
    got, want = (f"{x[at].item():.9g}" for x in (error.got, error.want))
    room = "to the bit" if error.allowed is None else f"± {error.allowed[at].item():.3g}"
    often = f" ({times[at].item():.3g} times the budget)" if times[at].isfinite() else ""
    return f"{error.where}{list(at)} is {got}, expected {want} {room}{often}"


def error_map(times: Tensor, tile: tuple[int, int]) -> tuple[str, list[str]]:
    """How many times its budget each element is off, as characters: (what one of them stands for, the rows).

    Leading axes are folded into the rows. A character is one element, or the worst of as many as it takes to fit;
    lines are drawn between tiles as long as these are larger than that.
    """
    grid = times.reshape(-1, times.shape[-1] if times.dim() else 1).cpu()  # [rows, columns]
    cell = [1 << max(0, math.ceil(n / most) - 1).bit_length() for n, most in zip(grid.shape, (ROWS, COLUMNS))]
    worst = F.max_pool2d(grid[None], cell, ceil_mode=True)[0]
    down, across = (max(1, t // c) for t, c in zip(tile, cell))  # characters of a tile
    rows = ["".join(map(symbol, row)) for row in worst.tolist()]
    unit = f"a character is {'one element' if cell == [1, 1] else f'the worst of {cell[0]} x {cell[1]} elements'}"
    if down == across == 1:
        return unit, rows
    rows = ["|".join(row[j : j + across] for j in range(0, len(row), across)) for row in rows]
    edge = "".join("+" if c == "|" else "-" for c in rows[0])
    ruled = [x for i, row in enumerate(rows) for x in ([edge, row] if i and i % down == 0 else [row])]
    return f"{unit}, lines part tiles of {tile[0]} x {tile[1]}", ruled


def symbol(times: float) -> str:
    if times <= 1:
        return "."
    return "#" if math.isinf(times) else str(min(9, 1 + int(math.log10(times))))
