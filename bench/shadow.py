"""Would a model notice? `python -m bench.shadow --op int4_matmul --impl packed`

Runs a model on real prompts, prefill and decode, with the candidate beside whatever it runs now: every call of the op
is made by both, on the same arguments, and the model goes on with the incumbent's result. For every layer: how far
apart they are, in steps of the dtype and relative, and how much of the computed error budget the candidate's worst
element takes (of the first call of the layer, and of each that differs more than those before it). Then the model runs
once more with the candidate alone on the same tokens: what became of the logits. The inputs of the worst call are saved
for `bench.check --replay`. Exit code: 0 all within budget, 1 not, 2 the command itself.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

from vila_triton.chat.conversation import Talker
from vila_triton.console import bar
from vila_triton.limits import COUNT, MANY, SEED
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import OPS, Impl, checked, recording, use
from vila_triton.registry.interpreter import holds_kernels

from ._tool import tool
from .correctness import repro_bundle
from .correctness.error_budget import DEVICE
from .correctness.failure_report import crash
from .correctness.shadow_recorder import BUCKETS, Beside
from .measure import prompts as questions
from .measure import rows
from .measure.prompts import Prompt

SHOWN = 10  # flips that are listed


@torch.inference_mode()
def run(
    talker: Talker, prompt: Prompt, steps: int, tokens: list[int] | None = None, beside: Beside | None = None
) -> tuple[Tensor, list[int], int]:
    """Prefill a prompt and decode up to `steps` tokens, greedily or the given ones.

    -> (logits [t, v] of every position, the tokens decoded, how many of the positions were prefilled)
    """
    ids = torch.tensor([talker.prompt(prompt.question, len(prompt.pictures))])
    images = talker.pixels(prompt.pictures) if prompt.pictures else None
    stop = talker.model.config.parts()["llm"].get("eos_token_id")
    if beside:
        beside.phase = "prefill"
    out = talker.model(ids, images=images, use_cache=True)
    logits, decoded = [out.logits[0]], []
    if beside:
        beside.phase = "decode"
    for step in range(steps if tokens is None else len(tokens)):
        token = int(logits[-1][-1].argmax()) if tokens is None else tokens[step]
        if tokens is None and token == stop:
            break
        decoded.append(token)
        out = talker.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits), decoded, len(logits[0])


@dataclass(frozen=True)
class Shift:
    """What became of the logits of one prompt: KL divergence in nats [t], and where another token is likeliest."""

    divergence: Tensor
    flips: list[tuple[str, int, int]]  # position, token before, token now


def shift(before: Tensor, now: Tensor, prefilled: int) -> Shift:
    p, q = (x.double().log_softmax(-1) for x in (before, now))
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    old, new = before.argmax(-1), now.argmax(-1)
    flips = [
        (f"prefill {i}" if i < prefilled else f"decode {i - prefilled}", int(old[i]), int(new[i]))
        for i in (old != new).nonzero()[:, 0].tolist()
    ]
    return Shift(divergence, flips)


def table(beside: Beside) -> Iterator[str]:
    """A line for every layer, a line for every reason a budget is missing, and the first layer that is wrong."""
    lines = beside.lines
    width = max(map(len, lines)) + 2
    yield f"{'ulp:':>{width + 5}}{''.join(f'{b:>8}' for b in BUCKETS)}{'relative':>11}{'largest':>11}{'x budget':>11}"
    for name, line in lines.items():
        total = line.ulps.total()
        shares = "".join(f"{line.ulps[b] / total:8.2%}" if line.ulps[b] else f"{'-':>8}" for b in BUCKETS)
        times = "-" if line.times is None else f"{line.times:.3g}"
        mark = f"  {line.failure or 'BEYOND BUDGET'}" if line.wrong else ""
        yield f"{name:{width}}{line.calls:5}{shares}{line.relative:11.2e}{line.largest:11.2e}{times:>11}{mark}"
    for reason in sorted({line.unchecked for line in lines.values()} - {""}):
        where = [name for name, line in lines.items() if line.unchecked == reason]
        yield f"no budget for some calls of {len(where)} layers, {where[0]} first: {reason}"
    if beside.first or any(line.times is not None for line in lines.values()):
        yield f"first layer beyond budget: {beside.first or 'none'}"


def shadow(
    talker: Talker, impl: Impl, prompts: Sequence[Prompt], steps: int, only: Sequence[str]
) -> tuple[Beside, set[str], list[Shift] | str]:
    """Both runs -> (what was watched, the incumbents, the shift of each prompt or why there is none)."""
    beside = Beside(OPS[impl.op], impl, talker.model.params, only)
    shifts: list[Shift] = []
    with recording() as calls, beside.watching():
        before = [run(talker, prompt, steps, beside=beside) for prompt in counted(prompts, "beside")]
    incumbents = {name for op, name in calls if op == impl.op}
    try:
        with use(**{impl.op: impl.name}):
            for prompt, (logits, tokens, prefilled) in zip(counted(prompts, "alone"), before):
                shifts.append(shift(logits, run(talker, prompt, steps, tokens)[0], prefilled))
    except Exception as error:  # a kernel may fail in any way at all
        return beside, incumbents, crash(error)
    return beside, incumbents, shifts


def counted(prompts: Sequence[Prompt], what: str) -> Iterator[Prompt]:
    """The prompts, counted on standard error."""
    for i, prompt in enumerate(prompts, 1):
        bar(f"{what}: prompt {i} of {len(prompts)}")
        yield prompt
    bar("")


def summary(shifts: Sequence[Shift], words: Callable[[int], str]) -> Iterator[str]:
    """What became of the logits, over all prompts."""
    divergence = torch.cat([s.divergence for s in shifts])
    flips = [(i, *flip) for i, s in enumerate(shifts, 1) for flip in s.flips]
    yield (
        f"the model on the candidate alone, {len(divergence)} positions: KL divergence "
        f"{divergence.mean():.2e} nats on average, {divergence.max():.2e} at most; {len(flips)} argmax flips"
    )
    for i, where, old, new in flips[:SHOWN]:
        yield f"  prompt {i}, {where}: {words(old)!r} becomes {words(new)!r}"
    if len(flips) > SHOWN:
        yield f"  and {len(flips) - SHOWN} more"


def found(beside: Beside, shifts: Sequence[Shift] | str, model: str) -> Iterator[dict[str, Any]]:
    """The rows: one for every layer, one for the model."""
    here = {"kind": "shadow", "model": model, "op": beside.op.name, "impl": beside.candidate.name}
    here |= rows.stamp(torch.device(DEVICE))
    for name, line in beside.lines.items():
        yield {**here, "layer": name, **vars(line)}
    if isinstance(shifts, str):
        yield {**here, "failure": shifts}
    else:
        divergence = [s.divergence.tolist() for s in shifts]
        yield {**here, "divergence": divergence, "flips": [s.flips for s in shifts]}


def save(beside: Beside, file: Path) -> None:
    """The worst call as a bundle."""
    worst = beside.worst
    assert worst is not None
    origin = f"bench.shadow: {worst.name}, {worst.phase}"
    repro_bundle.save(file, beside.candidate, worst.config, worst.args, 0, "aligned", {}, origin)
    print(f"worst call: {worst.name}, {worst.phase}: python -m bench.check --replay {file}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", required=True)
    parser.add_argument("--impl", required=True, help="the candidate")
    parser.add_argument("--model", type=Path, help="a VILA folder (default: a bundled one)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help='lines of {"question": ..., "images": [FILE, ...]}'
    )
    parser.add_argument("--count", type=COUNT, default=2, help="bundled questions (default: %(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="which questions")
    parser.add_argument("--tokens", type=MANY, default=8, help="decoded for each prompt, at most (%(default)s)")
    parser.add_argument("--layers", nargs="+", default=[], metavar="TEXT", help="only calls named like one of these")
    parser.add_argument("--save", type=Path, metavar="FILE", help="bundle of the worst call")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append rows to this file")
    return parser.parse_args(argv)


@tool
def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    checked({args.op: args.impl})
    impl = OPS[args.op].impls[args.impl]
    folder = args.model or (
        BUNDLED_CHECKPOINT.with_name("checkpoint-int4") if args.op.startswith("int4") else BUNDLED_CHECKPOINT
    )
    prompts = questions.read(args.prompts) if args.prompts else questions.bundled(args.count, args.seed)
    talker = Talker.from_pretrained(folder, DEVICE)
    beside, incumbents, shifts = shadow(talker, impl, prompts, args.tokens, args.layers)
    if not beside.lines:
        named = f" in a layer named like {', '.join(args.layers)}" if args.layers else ""
        raise ValueError(f"{folder.name} makes no call of {args.op}{named} on these prompts")
    how = "interpreted (no GPU)" if DEVICE == "cpu" else "compiled"
    print(f"{args.op}: {args.impl} beside {' and '.join(sorted(incumbents))}; {folder.name}, prompts: {len(prompts)}")
    if any(holds_kernels(OPS[args.op].impls[name]) for name in (args.impl, *incumbents)):
        print(f"Triton kernels run {how}")
    print("\n".join(table(beside)))
    if isinstance(shifts, str):
        print(f"the model does not run on the candidate alone: {shifts}")
    else:
        print("\n".join(summary(shifts, lambda token: talker.tokenizer.decode([token]))))
    usual = Path(tempfile.gettempdir()) / f"{args.op}-{args.impl}-shadow.bundle"
    save(beside, args.save or repro_bundle.unused(usual))
    if args.json:
        rows.write(args.json, found(beside, shifts, folder.name))
    return 1 if isinstance(shifts, str) or beside.first else 0


if __name__ == "__main__":
    sys.exit(main())
