"""Describe a failure in words and as a map of its errors, as `check` prints it, and release memory after one."""

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

from .error_budget import error_over_budget
from .guarded_memory import MismatchError

ROWS, COLUMNS = 24, 100  # of characters
TILE = 16
LEGEND = f"{'':15}. is within the budget, 1 up to 10 times it, 2 up to 100 times, ...; # NaN, infinite or a wrong bit"


def label(title: str) -> str:
    """The left column of a line of the report."""
    return f"  {title:13}"


def format_settings(values: Mapping[str, Any]) -> str:
    """Returns names and values as one text: n=4096 G=32."""
    return " ".join(f"{key}={value}" for key, value in values.items())


def describe_failure(error: Exception, impl: Impl, config: Mapping[str, Any]) -> list[str]:
    """Lines: the check that failed and `describe_elements`; of a crash, the exception and the source lines it arose
    at."""
    if not isinstance(error, MismatchError):
        lines = [f"{label('')}at {line}" for line in source_lines(error, impl)]
        return [f"{label('what failed')}crashed: {exception_line(error)}", *lines]
    legend = [LEGEND] if error.tensor_name else []
    return [f"{label('what failed')}{error.kind}: {error}", *describe_elements(error, config), *legend]


def describe_elements(error: Exception, config: Mapping[str, Any]) -> list[str]:
    """Lines: the first wrong element and the error map; none where no tensor is wrong."""
    if not isinstance(error, MismatchError) or error.actual is None or error.expected is None:
        return []
    multiples = error_over_budget(error.actual, error.expected, error.budget)
    unit, rows = error_map(multiples, (config.get("BLOCK_M", TILE), config.get("BLOCK_N", TILE)))
    return [
        f"{label('first wrong')}{describe_first_wrong(error, multiples)}",
        f"{label('error map')}{error.tensor_name} {list(error.actual.shape)}; {unit}",
        *(f"{label('')}{row}" for row in rows),
    ]


def exception_line(error: Exception) -> str:
    """The exception in one line, or the one that Triton's interpreter wrapped in it."""
    inner = error.__cause__ or error
    return f"{type(inner).__name__}: {inner}".splitlines()[0]


def refusal_reason(error: Exception) -> str:
    """The reason in one line that something was not timed."""
    return f"unsupported: {error}" if isinstance(error, Unsupported) else exception_line(error)


def release_memory(device: torch.device) -> None:
    """Free the memory that a failure left allocated. Call it when its exception is no longer being handled, since the
    traceback keeps that memory. Errors: RuntimeError if the failure broke the CUDA context, so that no later result
    would be right.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def source_lines(error: BaseException, impl: Impl) -> list[str]:
    """The lines of the implementation's own file that were running, outermost first."""
    frames = [f for e in (error, error.__cause__) if e for f in traceback.extract_tb(e.__traceback__)]
    return [f"{impl.file.name}:{f.lineno}  {f.line}" for f in frames if Path(f.filename).resolve() == impl.file]


def describe_first_wrong(error: MismatchError, multiples: Tensor) -> str:
    """The first element, in index order, that is beyond its budget."""
    assert error.actual is not None and error.expected is not None
    index = tuple((multiples > 1).nonzero()[0].tolist())
    actual, expected = (f"{x[index].item():.9g}" for x in (error.actual, error.expected))
    tolerance = "to the bit" if error.budget is None else f"± {error.budget[index].item():.3g}"
    suffix = f" ({multiples[index].item():.3g} times the budget)" if multiples[index].isfinite() else ""
    return f"{error.tensor_name}{list(index)} is {actual}, expected {expected} {tolerance}{suffix}"


def error_map(multiples: Tensor, tile: tuple[int, int]) -> tuple[str, list[str]]:
    """The multiple of its budget that each element is off, as characters: (the meaning of one character, the rows).

    Leading axes are folded into the rows. A character is one element, or the worst of several so that the map fits;
    lines separate tiles as long as a tile is larger than that.
    """
    grid = multiples.reshape(-1, multiples.shape[-1] if multiples.dim() else 1).cpu()  # [rows, columns]
    cell = [1 << max(0, math.ceil(n / limit) - 1).bit_length() for n, limit in zip(grid.shape, (ROWS, COLUMNS))]
    worst = F.max_pool2d(grid[None], cell, ceil_mode=True)[0]
    down, across = (max(1, t // c) for t, c in zip(tile, cell))  # characters of a tile
    rows = ["".join(map(map_symbol, row)) for row in worst.tolist()]
    unit = f"a character is {'one element' if cell == [1, 1] else f'the worst of {cell[0]} x {cell[1]} elements'}"
    if down == across == 1:
        return unit, rows
    rows = ["|".join(row[j : j + across] for j in range(0, len(row), across)) for row in rows]
    edge = "".join("+" if c == "|" else "-" for c in rows[0])
    ruled = [x for i, row in enumerate(rows) for x in ([edge, row] if i and i % down == 0 else [row])]
    return f"{unit}, lines part tiles of {tile[0]} x {tile[1]}", ruled


def map_symbol(multiple: float) -> str:
    """Returns the character of an error, a multiple of its budget: "." within it, "#" if infinite, else a digit.

    The digit 1 stands for less than 10 times the budget, 2 for less than 100 times, and so on up to 9 for all beyond.
    """
    if multiple <= 1:
        return "."
    return "#" if math.isinf(multiple) else str(min(9, 1 + int(math.log10(multiple))))
