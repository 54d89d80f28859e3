"""The goals of attention, checked on rows of `bench.ops --default` and `bench.model`; `python -m bench.goals` prints
them.

    prefill    a whole prompt of 2,048 tokens or more: 0.75 of the speed of the fastest peer on the same machine
               (torch's flash and cuDNN back ends unpaged, FlashAttention, FlashInfer); 0.95 would be better still
    copy       100 MB of keys and values or more, at any batch: 0.85 of the bandwidth of a device copy
    decode     0.97 of the speed of FlashInfer, at any batch
    streaming  the time of 32 new tokens after up to 1,024 cached ones within 1.05 of the time after 16, and after up
               to 16,384 within 1.3: of a whole model, by `bench.model --histories 16,1024,8160`, as far as the model
               was made for
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from .measured_points import MeasuredPoint, Row, measured_points, report_goal

PREFILL, STRETCH, COPY, DECODE = 0.75, 0.95, 0.85, 0.97
PEERS = ("sdpa_flash", "sdpa_cudnn", "flash_attn", "flashinfer")
LARGE_BYTES = 100e6  # bytes
SHORT_HISTORY = 16  # tokens of the history that others are compared with
STREAMING = {1024: 1.05, 16384: 1.3}  # tokens of the history, up to: times as long at most


def bandwidth_share(point: MeasuredPoint) -> float | None:
    """Returns the bandwidth as a share of that of a device copy."""
    return point.default_row["bytes_share"] if point.default_row else None


def peer_ratio(point: MeasuredPoint, peers: Sequence[str]) -> float | None:
    """Returns the time of the fastest peer over ours, if both were measured."""
    return point.ratio(*peers)


def report_attention_goals(measured_rows: Sequence[Row]) -> Iterator[str]:
    """Yields the lines of those goals that there are rows of."""
    prefill_points = [
        p for p in measured_points(measured_rows, "prefill_attention") if p.case == "whole" and p.sizes["s"] >= 2048
    ]
    if prefill_points:
        yield from report_goal("prefill", PREFILL, partial(peer_ratio, peers=PEERS), prefill_points)
        ratios = [r for p in prefill_points if (r := p.ratio(*PEERS)) is not None]
        yield f"  stretch: {sum(r >= STRETCH for r in ratios)} of {len(ratios)} points reach {STRETCH}"
    decode_points = [p for p in measured_points(measured_rows, "decode_attention") if p.case == "decode"]
    if decode_points:
        large_points = [p for p in decode_points if p.default_row and p.default_row["bytes"] >= LARGE_BYTES]
        yield from report_goal("copy", COPY, bandwidth_share, large_points)
        yield from report_goal("decode", DECODE, partial(peer_ratio, peers=("flashinfer",)), decode_points)
    yield from report_streaming([row for row in measured_rows if row["kind"] == "model" and row["what"] == "streaming"])


def report_streaming(measured_rows: Sequence[Row]) -> Iterator[str]:
    """Yields a line for each kind of model and history."""
    models: dict[tuple, dict[int, float]] = {}
    for row in measured_rows:
        key = tuple(row[name] for name in ("device", "model", "layers", "weights", "choice", "prompt"))
        models.setdefault(key, {})[row["history"]] = row["seconds"]
    for key, seconds in models.items():
        name = f"goal streaming {' '.join(map(str, key))}"
        for shortest, longest in pairwise([SHORT_HISTORY, *STREAMING]):
            history = max((h for h in seconds if shortest < h <= longest), default=None)
            if SHORT_HISTORY not in seconds or history is None:
                yield f"{name} after up to {longest}: NOT MEASURED"
                continue
            ratio, limit = seconds[history] / seconds[SHORT_HISTORY], STREAMING[longest]
            state = "MET" if ratio <= limit else "NOT MET"
            yield f"{name} after {history}: {state}: {ratio:.3f} of the time after {SHORT_HISTORY}, at most {limit}"
