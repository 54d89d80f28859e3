"""Mutants that no call can tell from the original: each with its reason, and the comparison of bits that shows it."""

import hashlib
import tempfile
import tomllib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vila_triton.files.json_schema import require_schema

from ..measure.rows import ROOT
from .draw import all_mutants
from .find_mutant import impls_of
from .planted import plant_text
from .processes import Extend, Failed, run_processes
from .source import Mutant

FILE = Path(__file__).with_suffix(".toml")
NUM_DRAWS = 300  # calls of each config of each implementation, in each memory layout
CALL_SECONDS = 60.0


@dataclass(frozen=True)
class Calls:
    """The calls of all implementations that run code of a file, with its text as it is, or with that of a mutant."""

    file: str
    mutant: Mutant | None
    num_draws: int = NUM_DRAWS


def read_equivalent(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Returns the entries of `equivalent.toml` by id. Errors: `LoadError`, ValueError for an id that occurs twice."""
    entries = tomllib.loads(file.read_text()).get("mutant", [])
    for entry in entries:
        require_schema(entry, {"id": str, "file": str, "change": str, "reason": str}, str(file))
    found = {entry["id"]: entry for entry in entries}
    if len(found) < len(entries):
        raise ValueError(f"{file}: an id occurs twice")
    return found


def equivalent_mutants(entries: Mapping[str, Mapping[str, Any]]) -> list[Mutant]:
    """Returns the mutants of the entries. Errors: ValueError for an entry that no rule makes any more."""
    mutants = []
    for name, entry in entries.items():
        found = [x for x, _ in all_mutants(entry["file"]) if x.id == name]
        if not found or found[0].diff() != entry["change"]:
            made = found[0].diff() if found else "nothing"
            raise ValueError(f"{FILE}: {name} is {entry['change']!r}, but the rules make {made!r} of it")
        mutants.append(found[0])
    return mutants


def bits(calls: Calls, extend: Extend) -> list[str]:
    """Returns a hash of the results of each call, and of what it leaves in its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        if calls.mutant:
            plant_text(calls.file, calls.mutant.apply((ROOT / calls.file).read_text()), Path(folder))
        return list(hashes(calls, extend))


def hashes(calls: Calls, extend: Extend) -> Iterator[str]:
    """Yields the hash of each call; that of an exception is its type."""
    from vila_triton.registry import OPS

    from ..correctness.error_budget import example_args
    from ..correctness.gate import random_sizes
    from ..correctness.guarded_memory import MEMORY_LAYOUTS, bit_pattern, guard_tensor, map_tensors, tensors

    for impl in impls_of(calls.file):
        op = OPS[impl.op]
        for config in impl.configs:
            for sizes in islice(random_sizes(op), calls.num_draws):
                for layout in MEMORY_LAYOUTS:
                    extend(CALL_SECONDS)
                    rng = torch.Generator().manual_seed(sizes["seed"])
                    args = map_tensors(
                        lambda x, rng=rng, to=layout: guard_tensor(x, rng, to).view, example_args(op, **sizes)
                    )
                    try:
                        found = [*tensors(impl(*args, config=config)), *tensors(args)]
                    except Exception as error:  # a mutant may fail in any way
                        yield type(error).__name__
                        continue
                    digest = hashlib.sha256()
                    for x in found:
                        digest.update(
                            f"{x.dtype}{tuple(x.shape)}".encode() + bit_pattern(x.contiguous()).numpy().tobytes()
                        )
                    yield digest.hexdigest()


def verify_all(mutants: Sequence[Mutant], processes: int) -> Iterator[str]:
    """Yields a line for each mutant: the number of calls, and how many gave other bits. Errors: ValueError for one that
    is not equivalent, after all lines.
    """
    originals = {
        calls.file: found for calls, found in run(dict.fromkeys(Calls(x.file, None) for x in mutants), processes)
    }
    wrong = []
    for calls, found in run([Calls(x.file, x) for x in mutants], processes):
        assert calls.mutant
        expected = originals[calls.file]
        differ = (
            len(expected) if isinstance(found, Failed) else sum(a != b for a, b in zip(expected, found, strict=True))
        )
        if differ or not expected:
            wrong.append(calls.mutant.id)
        yield f"{calls.mutant.id}  {calls.file}:{calls.mutant.line}  {differ} of {len(expected)} calls differ"
    if wrong:
        raise ValueError(f"not equivalent: {', '.join(wrong)}")


def run(calls: Any, processes: int) -> Iterator[tuple[Calls, Any]]:
    """Yields the hashes of each."""
    return run_processes(bits, deque(calls), processes)
