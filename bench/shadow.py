"""Compare a candidate with the default inside a model: `python -m bench.shadow --op int4_matmul --impl packed`

A model runs on real prompts, prefill and decode, and every call of the op is made twice with the same arguments: by the
incumbent, which runs by default and whose result the model uses, and by the candidate. The table gives for every layer
the distance of their results, in units in the last place and relative, and the error of the candidate's worst element
as a multiple of its budget (of the first call of the layer, and of each call that differs more than those before). The
model then runs on the candidate alone with the same tokens, which shows the change of its logits. The inputs of the
worst call are saved for `bench.check --replay`. Without a GPU Triton kernels run in its interpreter; with `--compiled
sm_80` the candidate's are those that the compiler makes for that GPU, emulated, in bfloat16 too.
Exit code: 0 all within budget, 1 not, 2 the command failed.
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

if not torch.cuda.is_available() and not any(word.startswith("--compiled") for word in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

from vila_triton.arguments import DTYPES
from vila_triton.chat.conversation import ChatModel
from vila_triton.console import print_progress
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.limits import COUNT, COUNT_OR_ZERO, SEED
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import OPS, Impl, count_calls, use, validate_choices
from vila_triton.registry.interpreter import uses_triton_kernels

from ._tool import kernels_option, tool
from .correctness import repro_bundle
from .correctness.compiled_calls import RUNS_COMPILED, compiled_for, repeat_compiled
from .correctness.error_budget import DEVICE
from .correctness.failure_report import exception_line
from .correctness.shadow_recorder import ULP_BUCKETS, ShadowRecorder
from .emulator.compile import EMULATED_TARGETS
from .measure import prompts as questions
from .measure import rows
from .measure.prompts import Prompt

MAX_LISTED_FLIPS = 10


@torch.inference_mode()
def run_prompt(
    chat_model: ChatModel,
    prompt: Prompt,
    steps: int,
    tokens: list[int] | None = None,
    recorder: ShadowRecorder | None = None,
) -> tuple[Tensor, list[int], int]:
    """Prefill a prompt and decode up to `steps` tokens, greedily or the given ones.

    -> (logits [t, v] of every position, the decoded tokens, the number of prefilled positions)
    """
    ids = torch.tensor([chat_model.prompt_ids(prompt.question, len(prompt.images))])
    images = chat_model.preprocess_images(prompt.images) if prompt.images else None
    stop = chat_model.model.config.part_configs()["llm"].get("eos_token_id")
    if recorder:
        recorder.phase = "prefill"
    out = chat_model.model(ids, images=images, use_cache=True)
    logits, decoded = [out.logits[0]], []
    if recorder:
        recorder.phase = "decode"
    for step in range(steps if tokens is None else len(tokens)):
        token = int(logits[-1][-1].argmax()) if tokens is None else tokens[step]
        if tokens is None and token == stop:
            break
        decoded.append(token)
        out = chat_model.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits), decoded, len(logits[0])


@dataclass(frozen=True)
class LogitShift:
    """The change of the logits of one prompt: KL divergence in nats [t], and positions with another likeliest token."""

    divergence: Tensor
    flips: list[tuple[str, int, int]]  # position, token before, token now


def logit_shift(incumbent: Tensor, candidate: Tensor, prefilled: int) -> LogitShift:
    """Returns the change from the incumbent's logits to the candidate's, both [t, v], at each position of a prompt.

    The first `prefilled` positions are named "prefill i", those after them "decode i".
    """
    p, q = (x.double().log_softmax(-1) for x in (incumbent, candidate))
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    old, new = incumbent.argmax(-1), candidate.argmax(-1)
    flips = [
        (f"prefill {i}" if i < prefilled else f"decode {i - prefilled}", int(old[i]), int(new[i]))
        for i in (old != new).nonzero()[:, 0].tolist()
    ]
    return LogitShift(divergence, flips)


def comparison_table(recorder: ShadowRecorder) -> Iterator[str]:
    """A line for every layer, one for every reason why a budget is missing, and the first failing layer."""
    layers = recorder.layers
    width = max(map(len, layers)) + 2
    buckets = "".join(f"{b:>8}" for b in ULP_BUCKETS)
    yield f"{'ulp:':>{width + 5}}{buckets}{'relative':>11}{'largest':>11}{'x budget':>11}"
    for name, layer in layers.items():
        total = layer.ulps.total()
        shares = "".join(f"{layer.ulps[b] / total:8.2%}" if layer.ulps[b] else f"{'-':>8}" for b in ULP_BUCKETS)
        multiple = "-" if layer.budget_multiple is None else f"{layer.budget_multiple:.3g}"
        verdict = f"  {layer.failure or 'BEYOND BUDGET'}" if layer.wrong else ""
        yield f"{name:{width}}{layer.calls:5}{shares}{layer.relative:11.2e}{layer.largest:11.2e}{multiple:>11}{verdict}"
    for reason in sorted({line.unchecked for line in layers.values()} - {""}):
        names = [name for name, line in layers.items() if line.unchecked == reason]
        yield f"no budget for some calls of {len(names)} layers, {names[0]} first: {reason}"
    if recorder.first_failure or any(line.budget_multiple is not None for line in layers.values()):
        yield f"first layer beyond budget: {recorder.first_failure or 'none'}"


def run_shadow(
    chat_model: ChatModel,
    impl: Impl,
    prompts: Sequence[Prompt],
    steps: int,
    only: Sequence[str],
    target: str | None = None,
) -> tuple[ShadowRecorder, set[str], list[LogitShift] | str]:
    """Make both runs -> (the recorder, the incumbents, the logit shift of each prompt or the reason for none).

    target: the candidate runs as compiled for it, in the emulator.
    """
    recorder = ShadowRecorder(OPS[impl.op], impl, chat_model.model.params, only, target)
    shifts: list[LogitShift] = []
    with count_calls() as calls, recorder.recording():
        incumbent_runs = [
            run_prompt(chat_model, prompt, steps, recorder=recorder) for prompt in with_progress(prompts, "beside")
        ]
    incumbents = {name for op, name in calls if op == impl.op}
    try:
        with use(**{impl.op: impl.name}), compiled_for(target, impl, {}):
            for prompt, (logits, tokens, prefilled) in zip(with_progress(prompts, "alone"), incumbent_runs):
                shifts.append(logit_shift(logits, run_prompt(chat_model, prompt, steps, tokens)[0], prefilled))
    except Exception as error:  # a kernel may fail in any way at all
        return recorder, incumbents, exception_line(error)
    return recorder, incumbents, shifts


def with_progress(prompts: Sequence[Prompt], label: str) -> Iterator[Prompt]:
    """The prompts, with a progress bar on standard error."""
    for i, prompt in enumerate(prompts, 1):
        print_progress(f"{label}: prompt {i} of {len(prompts)}")
        yield prompt
    print_progress("")


def summary_lines(shifts: Sequence[LogitShift], decode: Callable[[int], str]) -> Iterator[str]:
    """The change of the logits over all prompts."""
    divergence = torch.cat([s.divergence for s in shifts])
    flips = [(i, *flip) for i, s in enumerate(shifts, 1) for flip in s.flips]
    yield (
        f"the model on the candidate alone, {len(divergence)} positions: KL divergence "
        f"{divergence.mean():.2e} nats on average, {divergence.max():.2e} at most; {len(flips)} argmax flips"
    )
    for i, where, old, new in flips[:MAX_LISTED_FLIPS]:
        yield f"  prompt {i}, {where}: {decode(old)!r} becomes {decode(new)!r}"
    if len(flips) > MAX_LISTED_FLIPS:
        yield f"  and {len(flips) - MAX_LISTED_FLIPS} more"


def result_rows(recorder: ShadowRecorder, shifts: Sequence[LogitShift] | str, model: str) -> Iterator[dict[str, Any]]:
    """One row for every layer and one for the model."""
    fields = {"kind": "shadow", "model": model, "op": recorder.op.name, "impl": recorder.candidate.name}
    fields |= rows.stamp(torch.device(DEVICE))
    for name, layer in recorder.layers.items():
        yield {**fields, "layer": name, **vars(layer)}
    if isinstance(shifts, str):
        yield {**fields, "failure": shifts}
    else:
        divergence = [s.divergence.tolist() for s in shifts]
        yield {**fields, "divergence": divergence, "flips": [s.flips for s in shifts]}


def save_worst_call(recorder: ShadowRecorder, file: Path) -> None:
    """Save the worst call as a repro bundle."""
    worst = recorder.worst
    assert worst is not None
    origin = f"bench.shadow: {worst.name}, {worst.phase}"
    target = recorder.target or ""
    repro_bundle.save(file, recorder.candidate, worst.config, worst.args, 0, "aligned", {}, origin, target)
    print(f"worst call: {worst.name}, {worst.phase}: python -m bench.check --replay {file}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line of `python -m bench.shadow`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--op", required=True)
    parser.add_argument("--impl", required=True, help="the candidate")
    parser.add_argument(
        "--compiled", choices=EMULATED_TARGETS, help="run the candidate as it is compiled for this GPU, without one"
    )
    parser.add_argument("--model", type=Path, help="a VILA folder (default: a bundled one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of parameters and activations (default: as in config.json)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help='lines of {"question": ..., "images": [FILE, ...]}'
    )
    parser.add_argument("--count", type=COUNT, default=2, help="bundled questions (default: %(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="which questions")
    parser.add_argument(
        "--tokens", type=COUNT_OR_ZERO, default=8, help="decoded for each prompt, at most (%(default)s)"
    )
    parser.add_argument("--layers", nargs="+", default=[], metavar="TEXT", help="only calls named like one of these")
    parser.add_argument("--save", type=Path, metavar="FILE", help="bundle of the worst call")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append rows to this file")
    return parser.parse_args(argv)


@tool
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.compiled and not RUNS_COMPILED:
        return repeat_compiled("bench.shadow", sys.argv[1:] if argv is None else argv, args.compiled)
    validate_choices({args.op: args.impl})
    impl = OPS[args.op].impls[args.impl]
    folder = args.model or (
        BUNDLED_CHECKPOINT.with_name("checkpoint-int4") if args.op.startswith("int4") else BUNDLED_CHECKPOINT
    )
    prompts = questions.read_prompts(args.prompts) if args.prompts else questions.bundled_prompts(args.count, args.seed)
    chat_model = load_chat_model(folder, DEVICE, getattr(torch, args.dtype) if args.dtype else None)
    recorder, incumbents, shifts = run_shadow(chat_model, impl, prompts, args.tokens, args.layers, args.compiled)
    if not recorder.layers:
        filter_text = f" in a layer named like {', '.join(args.layers)}" if args.layers else ""
        advice = ""
        if args.op.endswith("_backward"):
            advice = f"; whether a model's gradients notice: bench.training --choice {args.op}={args.impl}"
        raise ValueError(f"{folder.name} makes no call of {args.op}{filter_text} on these prompts{advice}")
    mode = "interpreted (no GPU)" if DEVICE == "cpu" else "compiled"
    if args.compiled:
        mode = f"compiled for {args.compiled}, emulated"
    print(f"{args.op}: {args.impl} beside {' and '.join(sorted(incumbents))}; {folder.name}, prompts: {len(prompts)}")
    if any(uses_triton_kernels(OPS[args.op].impls[name]) for name in (args.impl, *incumbents)):
        print(f"Triton kernels run {mode}")
    print("\n".join(comparison_table(recorder)))
    if isinstance(shifts, str):
        print(f"the model does not run on the candidate alone: {shifts}")
    else:
        print("\n".join(summary_lines(shifts, lambda token: chat_model.tokenizer.decode([token]))))
    default_file = Path(tempfile.gettempdir()) / f"{args.op}-{args.impl}-shadow.bundle"
    save_worst_call(recorder, args.save or repro_bundle.unused_path(default_file))
    if args.json:
        rows.write(args.json, result_rows(recorder, shifts, folder.name))
    return 1 if isinstance(shifts, str) or recorder.first_failure else 0


if __name__ == "__main__":
    sys.exit(main())
