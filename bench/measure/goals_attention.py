"""The goals of attention, from rows of `bench.ops --served` and `bench.model`; `python -m bench.goals` prints them.

prefill    a whole prompt of 2,048 tokens or more: 0.75 of the speed of the fastest peer on the same machine
           (torch's flash and cuDNN back ends unpaged, FlashAttention, FlashInfer); 0.95 would be better still
copy       100 MB of keys and values or more, at any batch: 0.85 of the bandwidth of a device copy
decode     0.97 of the speed of FlashInfer, at any batch
streaming  the time of 32 new tokens after up to 1,024 cached ones within 1.05 of that after 16; after up to 16,384,
           within 1.3: of a whole model, by `bench.model --histories 16,1024,8160`, as far as it was made for
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from .measured_points import Point, Row, goal, points

PREFILL, STRETCH, COPY, DECODE = 0.75, 0.95, 0.85, 0.97
PEERS = ("sdpa_flash", "sdpa_cudnn", "flash_attn", "flashinfer")
LARGE = 100e6  # bytes
SHORT = 16  # tokens of the history that others are compared with
STREAMING = {1024: 1.05, 16384: 1.3}  # tokens of the history, up to: times as long at most


def bandwidth(point: Point) -> float | None:
    """Share of what a device copy reaches."""
    return point.ours["bytes_share"] if point.ours else None


def beside(point: Point, peers: Sequence[str]) -> float | None:
    return point.ratio(*peers)


def goals(found: Sequence[Row]) -> Iterator[str]:
    """Lines for those goals that there are rows of."""
    whole = [p for p in points(found, "prefill_attention") if p.case == "whole" and p.sizes["s"] >= 2048]
    if whole:
        yield from goal("prefill", PREFILL, partial(beside, peers=PEERS), whole)
        known = [r for p in whole if (r := p.ratio(*PEERS)) is not None]
        yield f"  stretch: {sum(r >= STRETCH for r in known)} of {len(known)} points reach {STRETCH}"
    decode = [p for p in points(found, "decode_attention") if p.case == "decode"]
    if decode:
        large = [p for p in decode if p.ours and p.ours["bytes"] >= LARGE]
        yield from goal("copy", COPY, bandwidth, large)
        yield from goal("decode", DECODE, partial(beside, peers=("flashinfer",)), decode)
    yield from streaming([row for row in found if row["kind"] == "model" and row["what"] == "stream"])


def streaming(found: Sequence[Row]) -> Iterator[str]:
    """A line for each kind of model and history."""
    models: dict[tuple, dict[int, float]] = {}
    for row in found:
        key = tuple(row[name] for name in ("device", "model", "layers", "weights", "choice", "prompt"))
        models.setdefault(key, {})[row["history"]] = row["seconds"]
    for key, seconds in models.items():
        name = f"goal streaming {' '.join(map(str, key))}"
        for shortest, longest in pairwise([SHORT, *STREAMING]):
            history = max((h for h in seconds if shortest < h <= longest), default=None)
            if SHORT not in seconds or history is None:
                yield f"{name} after up to {longest}: NOT MEASURED"
                continue
            ratio, most = seconds[history] / seconds[SHORT], STREAMING[longest]
            state = "MET" if ratio <= most else "NOT MET"
            yield f"{name} after {history}: {state}: {ratio:.3f} of the time after {SHORT}, at most {most}"
