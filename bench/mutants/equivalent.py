"""Mutants that no call can tell from the original: each with its reason, and the comparison of bits that shows it."""

import tomllib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_triton.files.json_schema import require_schema

from .draw import all_mutants
from .processes import Extend, Failed, run_processes
from .source import Mutant

if TYPE_CHECKING:
    from .equal_bits import CallBits

FILE = Path(__file__).with_suffix(".toml")
NUM_DRAWS = 300  # spread over the configs of the implementations, each called in both memory layouts

Job = tuple[str, Mutant | None, Sequence[Sequence[dict[str, Any]]]]  # a file, and the mutant with its sizes


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


def call_bits(job: Job, extend: Extend) -> "CallBits":
    """Makes the calls of a job; only this process imports the ops."""
    from .equal_bits import Calls, call_all

    file, mutant, sizes = job
    return call_all(Calls(file, NUM_DRAWS, mutant, sizes), extend)


def verify_all(mutants: Sequence[Mutant], processes: int) -> Iterator[str]:
    """Yields a line for each mutant: how many calls gave other bits.

    Errors: ValueError after all lines if one did, or if there were fewer than NUM_DRAWS in each memory layout.
    """
    files: deque[Job] = deque((file, None, ()) for file in sorted({mutant.file for mutant in mutants}))
    originals: dict[str, CallBits] = {file: found for (file, *_), found in run_processes(call_bits, files, processes)}
    jobs: deque[Job] = deque((mutant.file, mutant, originals[mutant.file].sizes) for mutant in mutants)
    wrong = []
    for (file, mutant, _), result in run_processes(call_bits, jobs, processes):
        expected = originals[file].hashes
        differ = sum(x != y for x, y in zip_longest(expected, [] if isinstance(result, Failed) else result.hashes))
        assert mutant
        wrong += [mutant.id] if differ or len(expected) < 2 * NUM_DRAWS else []
        yield f"{mutant.id}  {file}:{mutant.line}  {differ} of {len(expected)} calls differ"
    if wrong:
        raise ValueError(f"not equivalent: {', '.join(wrong)}")
