"""The mutants of files, and a draw of them that is spread over all files and rules."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from vila_triton.hashing import short_hash

from ..measure.rows import ROOT
from .kernel_rules import KERNEL_RULES
from .left_out import reason_to_leave_out
from .model_rules import MODEL_RULES
from .source import Mutant, Source


@lru_cache
def all_mutants(file: str) -> tuple[tuple[Mutant, str | None], ...]:
    """Returns the mutants of a file, named relative to the repository, each with the reason that it is left out."""
    source = Source((ROOT / file).read_text(), file)
    rules = KERNEL_RULES if file.startswith("kernels/") else MODEL_RULES
    return tuple((mutant, reason_to_leave_out(source, node)) for node, mutant in source.mutants(rules))


def mutants_of(file: str) -> list[Mutant]:
    """Returns the mutants of a file, named relative to the repository."""
    return [mutant for mutant, reason in all_mutants(file) if reason is None]


def left_out(files: Iterable[str]) -> Counter[str]:
    """Returns the number of mutants that are left out for each reason."""
    return Counter(reason for file in files for _, reason in all_mutants(file) if reason)


def draw(files: Sequence[str], count: int | None, seed: int) -> list[Mutant]:
    """Returns up to `count` mutants of the files, all of them for None; a larger count only adds to a smaller one.

    The first are one of each rule. Then the file comes next that has the fewest so far, with the rule that has the
    fewest in it, and in all.
    """
    pool = [mutant for file in files for mutant in mutants_of(file)]
    pool.sort(key=lambda mutant: short_hash(f"{seed} {mutant.id}".encode()))  # so that an edit changes little of it
    first_of_rule = {mutant.rule: mutant for mutant in reversed(pool)}
    drawn = [mutant for mutant in pool if mutant is first_of_rule[mutant.rule]][:count]
    taken: Counter[tuple[str, ...]] = Counter(key for mutant in drawn for key in keys(mutant))
    rest = [mutant for mutant in pool if mutant not in drawn]
    while rest and (count is None or len(drawn) < count):
        best = min(rest, key=lambda mutant: [taken[key] for key in keys(mutant)])
        rest.remove(best)
        drawn.append(best)
        taken.update(keys(best))
    return drawn


def keys(mutant: Mutant) -> tuple[tuple[str, ...], ...]:
    """Returns the groups that a draw takes as evenly as it can, the most important first."""
    return (mutant.file,), (mutant.file, mutant.rule), ("", mutant.rule)
