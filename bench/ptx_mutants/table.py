"""The table of planted faults, in Markdown: what was found by rule and by case, and by name all that was not."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from .run import CRASHED, DISPUTED, FOUND, HARMLESS, LOADS_MORE, MISSED, NOT_RUN, Outcome

VERDICTS = (FOUND, MISSED, CRASHED, DISPUTED, LOADS_MORE, HARMLESS, NOT_RUN)


def share_found(outcomes: Sequence[Outcome]) -> float:
    """Returns the share that was found of the faults that ran; 1 if none did."""
    numbers = Counter(x.verdict for x in outcomes)
    ran = numbers[FOUND] + numbers[MISSED] + numbers[CRASHED]
    return numbers[FOUND] / ran if ran else 1.0


def counts(title: str, outcomes: Sequence[Outcome], key: Callable[[Outcome], str]) -> Iterator[str]:
    """Yields a table of verdicts, one row for each value of `key`."""
    yield f"| {title} | planted | {' | '.join(VERDICTS)} |"
    yield "|---|" + "--:|" * (1 + len(VERDICTS))
    for name in dict.fromkeys(map(key, outcomes)):
        numbers = Counter(x.verdict for x in outcomes if key(x) == name)
        cells = (numbers.total(), *(numbers[verdict] or "" for verdict in VERDICTS))
        yield f"| {name} | {' | '.join(map(str, cells))} |"


def listed(outcomes: Sequence[Outcome], verdict: str) -> Iterator[str]:
    """Yields the outcomes of a verdict, a line for all of one case, rule and reason."""
    groups: dict[tuple[str, str, str, str], dict[str, list[str]]] = {}
    for x in outcomes:
        if x.verdict == verdict:
            places = groups.setdefault((x.case, x.kernel, x.rule, x.detail), {})
            places.setdefault(x.source, []).append(str(x.instruction))
    for (case, kernel, rule, detail), places in groups.items():
        listing = ", ".join(f"{line} (instruction {', '.join(numbers)})" for line, numbers in places.items())
        yield f"- {case} {kernel}: {rule}: {detail}: {listing}"


def report_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yields the lines of the report."""
    numbers = Counter(x.verdict for x in outcomes)
    ran = numbers[FOUND] + numbers[MISSED] + numbers[CRASHED]
    yield f"Found {numbers[FOUND]} of {ran} faults that ran ({share_found(outcomes):.1%}), of {len(outcomes)} planted."
    if more := numbers[LOADS_MORE]:
        share = numbers[FOUND] / (ran + more)
        yield f"With {more} bounds that only load more of what exists, and store the same, it is {share:.1%}."
    yield from ("", *counts("fault", outcomes, lambda x: x.rule))
    yield from ("", *counts("case", outcomes, lambda x: x.case))
    kinds = Counter(kind for x in outcomes if x.verdict == FOUND for kind in x.detail.split(", "))
    yield from ("", "Found by: " + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()) + ".")
    for verdict in VERDICTS[1:]:
        if numbers[verdict]:
            yield from ("", f"## {verdict.capitalize()}", "", *listed(outcomes, verdict))
