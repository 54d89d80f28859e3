"""Statistics of answers: time to the first token (TTFT), time per output token (TPOT), throughput, right answers."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .client import Outcome

LONG_ANSWER = 8  # tokens
# Of figures, those of which less is better; of the others more is.
TIMES = ("ttft", "ttft_p95", "tpot", "tpot_p95", "latency", "latency_p95")
RATES = ("tokens_per_s", "requests_per_s")


@dataclass(frozen=True)
class Run:
    """The outcomes of one segment of the trace, and the seconds that the client and processes that have nothing to do
    with it worked meanwhile.
    """

    outcomes: Sequence[Outcome]
    client_seconds: float = 0.0
    other_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """From the first request to the last end."""
        return max(o.end for o in self.outcomes) - min(o.start for o in self.outcomes)


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the value below which `percent` of the values lie, interpolated between the two nearest, as numpy's
    default. Errors: ValueError without values, or for a percentage outside 0 to 100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"the percentile {percent} of {len(values)} values")
    ordered, place = sorted(values), (len(values) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the figures of the answers of all runs together; a time that no answer has is left out.

    TTFT runs from when a request was to be sent to its first text, TPOT from there to its end, for each token behind
    the first, in answers of at least `LONG_ANSWER` tokens, as a server may send the few of a short one at once; on
    busy cores it does so with long ones, too; latency, from when a request was to be sent to its end, then says more.
    Throughput counts what was answered without error.
    """
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    answers = [outcome for outcome in outcomes if not outcome.error]
    seconds = sum(run.seconds for run in runs)
    result: dict[str, Any] = {}
    ttft = [outcome.first - outcome.start for outcome in answers]
    tpot = [
        (outcome.end - outcome.first) / (outcome.tokens - 1) for outcome in answers if outcome.tokens >= LONG_ANSWER
    ]
    latency = [outcome.end - outcome.start for outcome in answers]
    for name, values in (("ttft", ttft), ("tpot", tpot), ("latency", latency)):
        if values:
            result |= {name: statistics.median(values), f"{name}_p95": percentile(values, 95)}
    result |= {
        "tokens_per_s": sum(outcome.tokens for outcome in answers) / seconds,
        "requests_per_s": len(answers) / seconds,
        "requests": len(outcomes),
        "errors": len(outcomes) - len(answers),
        "right": right_share(runs),
        "client_cores": sum(run.client_seconds for run in runs) / seconds,
        "other_cores": sum(run.other_seconds for run in runs) / seconds,
    }
    return result


def ratios(runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, float]:
    """Returns figures over those of a baseline: the median over rounds of the ratio within a round, so that other load
    on the machine meets both alike. A figure that one of them lacks in a round is left out of it.
    """
    pairs = [(figures([mine]), figures([theirs])) for mine, theirs in zip(runs, baseline, strict=True)]
    return {
        name: statistics.median(values)
        for name in (*TIMES, *RATES)
        if (values := [mine[name] / theirs[name] for mine, theirs in pairs if mine.get(name) and theirs.get(name)])
    }


def right_share(runs: Sequence[Run]) -> float:
    """Returns the share of requests that were answered right."""
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    return sum(outcome.is_right for outcome in outcomes) / len(outcomes)


def wrong_answers(runs: Sequence[Run], least_right: float) -> str | None:
    """Returns the reason why times of these runs would mean nothing, or None: fewer right answers than a share."""
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    if len(outcomes) - len(wrong) >= least_right * len(outcomes):
        return None
    reason, count = Counter(map(describe_wrong, wrong)).most_common(1)[0]
    return f"{len(outcomes) - len(wrong)} of {len(outcomes)} answers are right; {count} x {reason}"


def describe_wrong(outcome: Outcome) -> str:
    """Returns the error of a request, or the question, what was answered and what is right."""
    if outcome.error:
        return outcome.error
    question = outcome.request.question
    return f"{question.question!r} was answered {outcome.text!r}, not {question.answer!r}"


def differing(runs: Sequence[Run], baseline: Sequence[Run]) -> int:
    """Returns how many answers are another text than the baseline's to the same request; errors are none."""
    pairs = (
        (a, b) for mine, theirs in zip(runs, baseline, strict=True) for a, b in zip(mine.outcomes, theirs.outcomes)
    )
    return sum(a.text.strip() != b.text.strip() for a, b in pairs if not (a.error or b.error))


def format_ratios(ratio: Mapping[str, float]) -> str:
    """Returns the ratios that a table shows: of TTFT, TPOT and tokens a second."""
    names = ("ttft", "tpot", "tokens_per_s")
    return "".join(f"{ratio[name]:8.2f}" if name in ratio else f"{'-':>8}" for name in names)
