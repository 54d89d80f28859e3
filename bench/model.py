"""How fast is a whole language model? `python -m bench.model --model vila1.5-3b --layers 2 --weights float32,int4`

Random weights of a released geometry (configs/models) take four kinds of step:

    prefill   a prompt to its first token
    stream    a question of 32 tokens to its first token, after a history that is cached
    decode    one more token for each sequence of a batch
    memory    the most that a prefill takes beyond the weights, keys and values included

for every kind of weights and every choice of kernels, beside Hugging Face's eager model of the same weights in the same
process. A runner whose logits are wrong gets no time (`bench.measure.runners.wrong`). All runners take turns within
a round, and a ratio is the median over rounds of the ratio within a round: what else the machine does meets all alike. `limit`
is the bytes the step must move (bench/measure/step_cost.py) over the bandwidth measured in this run: memory allows
nothing faster.
"""

import argparse
import statistics
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from vila_triton.console import bar
from vila_triton.limits import COUNT
from vila_triton.paths import config_dir
from vila_triton.registry import checked
from vila_triton.registry.kernel_config import pick_device

from . import roofline
from ._tool import tool
from .correctness.failure_report import refusal, release
from .measure import model_configs, rows, step_cost
from .measure.model_steps import Step, peak, steps, times, tokens
from .measure.runners import HF, Ours, Runner, Theirs, build, chosen, wrong
from .measure.timing import ceilings

WEIGHTS = ("float32", "float16", "bfloat16", "int4")
T = TypeVar("T")
GATE = 24  # tokens of the prompt whose logits are checked


def run(
    name: str, runners: Sequence[Runner], todo: Sequence[Step], rounds: int, bandwidth: float, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A row for every step and runner. Ratios are seconds over those of Hugging Face's model of the same weights
    (`ratio_hf`), and over those of the first runner (`ratio_first`).
    """
    here = rows.stamp(device)
    hf = {runner.model.weights: i for i, runner in enumerate(runners) if isinstance(runner, Theirs)}
    for step in todo:
        bar(f"measuring {step}", last=True)
        timed = step.what != "memory"
        seconds = times(runners, step, rounds, device) if timed else []
        for i, runner in enumerate(runners):
            model = runner.model
            about = {"what": step.what, **described(name, runner), **step.about}
            found = seconds[i] if timed else peak(runner, step, device)
            if isinstance(found, str):
                yield {"kind": "refused", **about, "reason": found, **here}
                continue
            if isinstance(found, int):
                yield {"kind": "model", **about, "peak_bytes": found, **here}
                continue
            least = step_cost.language(runner.reads, step.batch, step.new, step.history, model.dtype)
            middle = statistics.median(found)
            figures = {
                "seconds": middle, "low": min(found), "high": max(found), "rounds": rounds,
                "tokens_per_s": step.batch * step.new / middle, "limit_seconds": least.bytes / bandwidth,
            }  # fmt: skip
            beside = {"ratio_first": seconds[0], "ratio_hf": seconds[hf[model.weights]] if model.weights in hf else ""}
            figures |= {key: ratio(found, other) for key, other in beside.items() if not isinstance(other, str)}
            yield {"kind": "model", **about, **figures, **here}


def described(name: str, runner: Runner) -> dict[str, Any]:
    """What a row says of a runner."""
    model, dtype = runner.model, str(runner.model.dtype).removeprefix("torch.")
    about = {"model": name, "layers": model.cfg.num_hidden_layers}
    return {**about, "weights": model.weights, "dtype": dtype, "choice": runner.name}


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


HEAD = (
    f"{'':36}{'ms':>10}{'low':>10}{'high':>10}{'tokens/s':>10}{'limit ms':>10}{'of limit':>9}{'x hf':>8}{'x first':>8}"
)


def show(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    label = f"  {row['weights']} {row['choice']}"
    if row["kind"] == "refused":
        return f"{label:36.36}  no time: {row['reason']}"
    if row["what"] == "memory":
        return f"{label:36.36}{row['peak_bytes'] / 2**20:10.1f} MiB"
    ms = "".join(f"{row[key] * 1e3:10.2f}" for key in ("seconds", "low", "high"))
    limit = f"{row['limit_seconds'] * 1e3:10.2f}{row['limit_seconds'] / row['seconds']:9.1%}"
    ratios = (f"{row[key]:8.3f}" if key in row else f"{'-':>8}" for key in ("ratio_hf", "ratio_first"))
    return f"{label:36.36}{ms}{row['tokens_per_s']:10.1f}{limit}{''.join(ratios)}"


def published(model: str) -> Iterator[str]:
    """What others published for TinyChat on the same language model, a line for each machine and precision."""
    table = tomllib.loads((config_dir() / "bench" / "tinychat.toml").read_text())
    lines: dict[str, list[str]] = {}
    for what, length in (("prefill", "length"), ("streaming", "history"), ("decode", None)):
        for row in table[what]:
            if row["model"] == model:
                per_token = row["ms_per_token"] if "ms_per_token" in row else 1e3 / row.get("tokens_per_s", 1)
                ms = row["seconds"] * 1e3 if "seconds" in row else per_token
                at = f"{row[length]}: " if length else ""
                head = f"  {row['gpu']:6}{row['precision']:9}{row['published']:20}{what:10}"
                lines.setdefault(head, []).append(f"{at}{ms:.4g}")
    if lines:
        yield f"not measured here, for context: ms as published, all layers, batch 1 ({table['source']})"
        yield from (head + ", ".join(found) for head, found in lines.items())


def attempt(do: Callable[[], T], device: torch.device) -> T | str:
    """What it returns, or why it failed: one kind of weights or one runner may, in any way, and the others go on."""
    try:
        return do()
    except Exception as error:
        reason = refusal(error)
    release(device)
    return reason


def concerns_all(choice: str) -> bool:
    """Whether a choice says anything to a model without int4 weights."""
    return {name.startswith("int4_") for name in chosen(choice)} != {True}


def numbers(text: str) -> list[int]:
    """16,64 -> [16, 64]; nothing stands for none."""
    return [COUNT(part) for part in text.split(",") if part]


def compare(args: argparse.Namespace) -> int:
    """Build, check, time, print and write; 1 if something got no time."""
    device = pick_device(args.device)
    shape = model_configs.load(args.model, args.layers)
    todo = list(steps(args.prompts, args.histories, args.batches, args.contexts))
    unknown = [w for w in args.weights.split(",") if w not in WEIGHTS]
    if unknown:
        raise ValueError(f"no weights {', '.join(unknown)}; there are: {', '.join(WEIGHTS)}")
    if not todo:
        raise ValueError("nothing to time: --prompts, --histories and --contexts are empty")
    longest = max(step.history + step.new for step in todo)
    if longest > shape.llm.max_position_embeddings:
        raise ValueError(f"{longest} tokens, but {shape.name} was made for {shape.llm.max_position_embeddings}")
    for choice in args.choice:
        checked(chosen(choice))
    most, here = ceilings(device, ()), rows.stamp(device)
    print(f"{shape.name}, {shape.llm.num_hidden_layers} layers, {here['device']}, {most.bandwidth / 1e9:.1f} GB/s")
    refused = 0

    def refuse(about: Mapping[str, Any], reason: str) -> None:
        nonlocal refused
        refused += 1
        print(f"  {about['weights']} {about['choice']}: no time, {reason}", flush=True)
        if args.out:
            rows.write(args.out, [{"kind": "refused", **about, "reason": reason, **here}])

    runners: list[Runner] = []
    for weights in args.weights.split(","):
        bar(f"building {weights}", last=True)
        model = attempt(partial(build, shape.llm, weights, device), device)
        if isinstance(model, str):
            about = {"what": "build", "model": args.model, "layers": shape.llm.num_hidden_layers, "choice": "all"}
            refuse({**about, "weights": weights}, model)
            continue
        runners += [Ours(model, choice) for choice in args.choice if weights == "int4" or concerns_all(choice)]
        if args.against == "hf":
            theirs = attempt(partial(Theirs, model), device)
            if isinstance(theirs, str):
                refuse({"what": "build", "model": args.model, "weights": weights, "choice": HF}, theirs)
            else:
                runners.append(theirs)
    right: list[Runner] = []
    for runner in runners:
        reason = attempt(partial(wrong, runner, tokens(runner, 1, GATE)[0]), device)
        if reason is None:
            right.append(runner)
        else:
            refuse({"what": "logits", **described(args.model, runner)}, reason)
    print(HEAD)
    last = None
    for row in run(args.model, right, todo, args.rounds, most.bandwidth, device) if right else ():
        step = ", ".join(f"{name} {row[name]}" for name in ("batch", "prompt", "history", "context") if name in row)
        if (row["what"], step) != last:
            last = row["what"], step
            print(f"\n{row['what']}: {step}")
        print(show(row), flush=True)
        refused += row["kind"] == "refused"
        if args.out:
            rows.write(args.out, [row])
    print("", *published(args.model), sep="\n")
    return int(refused > 0)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vila1.5-3b", help="a name of configs/models, or a .toml file")
    parser.add_argument("--layers", type=COUNT, help="only so many of the language model's")
    parser.add_argument("--weights", default="float32,int4", help=f"of {', '.join(WEIGHTS)}, with commas")
    help_choice = "default, reference or OP=NAME,OP=NAME; may be repeated"
    parser.add_argument("--choice", action="append", default=[], metavar="CHOICE", help=help_choice)
    parser.add_argument("--prompts", type=numbers, default=[128, 512], help="lengths, with commas")
    parser.add_argument("--histories", type=numbers, default=[16, 64, 256], help="cached tokens before a question")
    parser.add_argument("--batches", type=numbers, default=[1], help="sequences that decode together")
    parser.add_argument("--contexts", type=numbers, default=[128, 512], help="tokens a new token attends to")
    parser.add_argument("--against", choices=("hf", "none"), default="hf", help=HF)
    parser.add_argument("--rounds", type=COUNT, default=7)
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    parser.add_argument("--device")
    parser.add_argument("--predict", metavar="GPU", help="time nothing: what the model could do at best, on paper")
    return parser


@tool
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.predict:
        others = [name for name, value in vars(args).items() if value != parser().get_default(name)]
        if ignored := [f"--{name}" for name in others if name not in ("predict", "model")]:
            parser().error(f"--predict takes --model and nothing else, not {', '.join(ignored)}")
        return roofline.main(["--gpu", args.predict, "--model", args.model])
    args.choice = args.choice or ["default"]
    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
