"""Named sizes to time and tune an op at: configs/bench/OP.toml, one table per case.

    [decode]                     # the case decode; an entry is one size or a list of them
    m = [1, 4, 16]
    n-G = [[4096, 32], [14336, 32]]   # names joined by - vary together
    group = 128
    dtype = "float16"

A table stands for every combination, in this order. An op without a file, or a size without an entry, takes the op's
representative sizes, so a new op has a case before anybody writes one.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from vila_triton.paths import config_dir
from vila_triton.registry import OPS, IntRange, OneOf, Op, describe_available, discover


@dataclass(frozen=True)
class Case:
    """The sizes of one call of an op, and the name of the case they come from."""

    op: str
    name: str
    sizes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.op} {self.name} " + " ".join(f"{k}={v}" for k, v in self.sizes.items())

    @property
    def cost(self) -> tuple[int, int]:
        """(FLOPs, bytes moved at least once)."""
        return OPS[self.op].cost(**self.sizes)


def random_arguments(case: Case, device: torch.device) -> Any:
    """Returns random arguments of the sizes of a case, drawn on the device."""
    with torch.device(device):
        return OPS[case.op].make_example(**case.sizes, rng=torch.Generator(device).manual_seed(0), device=str(device))  # pyright: ignore[reportCallIssue]


def representative_size(domain: IntRange | OneOf) -> Any:
    """Returns the largest size, a multiple of 16 if there is one, as the axes of real models are. Of listed values it
    returns the largest number, or the first if they are no numbers.
    """
    if isinstance(domain, OneOf):
        return max((x for x in domain.values if type(x) is int), default=domain.values[0])
    sizes = range(domain.low, domain.high + 1, domain.step)
    return max((n for n in sizes if n % 16 == 0 and n), default=sizes[-1])


def op_names() -> list[str]:
    """Returns the names of all ops."""
    discover()
    return list(OPS)


def size_combinations(table: Mapping[str, Any], op: Op) -> Iterator[dict[str, Any]]:
    """Yields every combination of the values of a table. Errors: ValueError for a size that the op does not have, or no
    value.
    """
    axes = [(key.split("-"), values if isinstance(values, list) else [values]) for key, values in table.items()]
    unknown = {name for names, _ in axes for name in names} - set(op.domain)
    if unknown:
        raise ValueError(f"{op.name} has no size {', '.join(sorted(unknown))}; it has {', '.join(op.domain)}")
    defaults = {name: representative_size(domain) for name, domain in op.domain.items()}
    if "dtype" in defaults:
        defaults["dtype"] = "float16"
    for choice in product(*(values for _, values in axes)):
        sizes = dict(defaults)
        for (keys, _), value in zip(axes, choice):
            sizes.update(zip(keys, value if len(keys) > 1 else [value], strict=True))
        yield sizes


def cases(op: str, case_name: str | None = None) -> list[Case]:
    """Returns the cases of an op, or those of one name. Errors: ValueError naming the cases there are."""
    if op not in op_names():
        raise ValueError(f"no op {op!r}; there are: {describe_available(OPS)}")
    file = config_dir() / "bench" / f"{op}.toml"
    tables = tomllib.loads(file.read_text()) if file.exists() else {"representative": {}}
    if case_name is not None and case_name not in tables:
        raise ValueError(f"{op} has no case {case_name!r}; there are: {', '.join(tables)}")
    selected = [case_name] if case_name else list(tables)
    return [Case(op, name, sizes) for name in selected for sizes in size_combinations(tables[name], OPS[op])]
