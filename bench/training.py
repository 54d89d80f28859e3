"""Times training steps of a language model: `python -m bench.training --model vila1.5-3b --layers 2`

A step is the loss of a batch and its gradients for all parameters, from random weights of a released model's shape
(configs/models); of int4 weights for adapters of rank 16 at all linears of the layers (LoRA by peft). The optimizer is
left out: it is the same for all. Beside our model, with every choice of kernels, runs Hugging Face's eager one of the
same weights, both without and with gradient checkpointing. A runner whose gradients are wrong gets no time (see
`bench.measure.training_runners`). All take turns within a round, and a ratio is the median over rounds of the ratio
within a round. The columns:

    ms         the median, and the least and longest
    peak       the most bytes that tensors of a step held at once beyond the parameters, gradients included
    a layer    what autograd keeps of one layer between its forward and its backward pass, counted by hooks: storages
               of two layers beyond those of one. `--kept` lists them

"x hf" is the ratio to Hugging Face's model with the same checkpointing.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_triton.device import pick_device
from vila_triton.limits import COUNT
from vila_triton.models.config import LlamaConfig
from vila_triton.registry import REFERENCE, validate_choices

from ._tool import kernels_option, tool
from .measure import model_configs, rows
from .measure.model_steps import synchronized_time
from .measure.runners import HF, parse_kernel_choices
from .measure.training_runners import (
    TrainingRunner,
    exact_gradients,
    gradient_errors,
    kept_tensors,
    make_runners,
    peak_bytes,
    wrong_gradients,
)
from .model import WEIGHTS, attempt, median_ratio

GATE_TOKENS = 24  # of the gradients that are checked
SMALL_VOCABULARY = 64  # where what a layer keeps is counted
MEASURES = ("time", "memory", "kept")


def random_ids(cfg: LlamaConfig, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Returns random token ids [b, t]."""
    return torch.randint(cfg.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def checked_runners(runners: Sequence[TrainingRunner], ids: Tensor) -> Iterator[tuple[TrainingRunner, str | None]]:
    """Yields every runner, and why its gradients are wrong or cannot be had, if so."""
    net = next(runner.net for runner in runners if runner.name != HF)
    exact = exact_gradients(net, ids)
    allowed = 2 * max(gradient_errors(TrainingRunner(REFERENCE, net, checkpointed=False), exact, ids).values())
    for runner in runners:
        yield runner, attempt(partial(wrong_gradients, runner, exact, allowed, ids), ids.device)


def time_steps(runners: Sequence[TrainingRunner], ids: Tensor, rounds: int) -> list[list[float]]:
    """Returns the seconds of every runner in every round, [runner][round]; their order alternates between rounds."""
    seconds: list[list[float]] = [[] for _ in runners]
    for number in range(rounds + 1):
        for i in range(len(runners))[:: -1 if number % 2 else 1]:
            start = synchronized_time(ids.device)
            runners[i].step(ids)
            seconds[i].append(synchronized_time(ids.device) - start)
            runners[i].clear()
    return [times[1:] for times in seconds]  # in the first, kernels are compiled


def kept_by_layer(
    cfg: LlamaConfig, weights: str, names: Sequence[str], ids: Tensor
) -> dict[tuple[str, bool], Counter[tuple[str, int]]]:
    """Returns `kept_tensors` of two layers beyond those of one, by runner and checkpointing."""
    ids = ids % SMALL_VOCABULARY
    counts: list[dict[tuple[str, bool], Counter[tuple[str, int]]]] = []
    for layers in (1, 2):
        small = replace(cfg, num_hidden_layers=layers, vocab_size=SMALL_VOCABULARY)
        runners = make_runners(small, weights, names, ids.device)
        counts.append({(runner.name, runner.checkpointed): kept_tensors(runner, ids) for runner in runners})
    return {key: two - counts[0][key] for key, two in counts[1].items()}


def measure(
    cfg: LlamaConfig, weights: str, names: Sequence[str], args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yields a row for every runner, in which a ratio to Hugging Face's is called `hf_...`."""
    runners = make_runners(cfg, weights, names, device)
    labels = {"model": args.model, "layers": cfg.num_hidden_layers, "weights": weights}
    labels |= {"dtype": str(runners[0].dtype).removeprefix("torch."), "batch": args.batch, "tokens": args.tokens}
    stamp, ids = rows.stamp(device), random_ids(cfg, args.batch, args.tokens, device)
    right: list[TrainingRunner] = []
    for runner, reason in checked_runners(runners, random_ids(cfg, 1, GATE_TOKENS, device)):
        if reason is None:
            right.append(runner)
        else:
            about = {"what": "gradients", **labels, "choice": runner.name, "checkpointed": runner.checkpointed}
            yield {"kind": "refused", **about, "reason": reason, **stamp}
    figures: dict[tuple[str, bool], dict[str, Any]] = {(x.name, x.checkpointed): {} for x in right}
    if "time" in args.measure:
        for runner, seconds in zip(right, time_steps(right, ids, args.rounds), strict=True):
            figures[runner.name, runner.checkpointed] |= {"all_seconds": seconds}
    if "memory" in args.measure:
        for runner in right:
            figures[runner.name, runner.checkpointed] |= {"peak_bytes": peak_bytes(runner, ids)}
    del runners
    if "kept" in args.measure:
        for key, kept in kept_by_layer(cfg, weights, names, ids).items():
            if key in figures:
                listing = [[name, size, n] for (name, size), n in sorted(kept.items(), key=lambda x: -x[0][1] * x[1])]
                figures[key] |= {"kept_bytes": sum(size * n for (_, size), n in kept.items()), "kept": listing}
    for runner in right:
        mine = figures[runner.name, runner.checkpointed]
        hf = next((x for (name, on), x in figures.items() if name == HF and on == runner.checkpointed), {})
        about = {"choice": runner.name, "checkpointed": runner.checkpointed}
        yield {"kind": "training", **labels, **about, **summary(mine, hf), **stamp}


def summary(mine: dict[str, Any], hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row from the figures of a runner and of Hugging Face's."""
    fields = {name: value for name, value in mine.items() if name != "all_seconds"}
    fields |= {f"hf_{name}": mine[name] / hf[name] for name in ("peak_bytes", "kept_bytes") if name in mine and hf}
    if "all_seconds" in mine:
        seconds = mine["all_seconds"]
        fields |= {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
        fields |= {"rounds": len(seconds)} | ({"hf_seconds": median_ratio(seconds, hf["all_seconds"])} if hf else {})
    return fields


COLUMNS = {  # fields of a row, with the title and the format of their figures
    "seconds": ("ms", lambda x: f"{x * 1e3:.1f}"),
    "low": ("low", lambda x: f"{x * 1e3:.1f}"),
    "high": ("high", lambda x: f"{x * 1e3:.1f}"),
    "hf_seconds": ("x hf", "{:.3f}".format),
    "peak_bytes": ("peak MiB", lambda x: f"{x / 2**20:.1f}"),
    "hf_peak_bytes": ("x hf", "{:.3f}".format),
    "kept_bytes": ("a layer", lambda x: f"{x / 2**20:.2f}"),
    "hf_kept_bytes": ("x hf", "{:.3f}".format),
}
HEAD = f"{'':36}{''.join(f'{title:>10}' for title, _ in COLUMNS.values())}"


def format_row(row: Mapping[str, Any]) -> str:
    """Returns one line of the table."""
    label = f"  {row['weights']} {row['choice']}{', checkpointed' * row['checkpointed']}"
    if row["kind"] == "refused":
        return f"{label:36} no time: {row['reason']}"
    cells = (text(row[name]) if name in row else "-" for name, (_, text) in COLUMNS.items())
    return f"{label:36}{''.join(f'{cell:>10}' for cell in cells)}"


def kept_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for every kind of tensor that is kept of a layer."""
    for name, size, count in row.get("kept", ()):
        yield f"{'':6}{size * count / 2**20:10.2f} MiB  {count} x {name}"


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line of `python -m bench.training`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--model", default="vila1.5-3b", help="a name of configs/models, or a .toml file")
    parser.add_argument("--layers", type=COUNT, help="only so many of the language model's")
    parser.add_argument("--weights", default="float32", help=f"of {', '.join(WEIGHTS)}, with commas")
    help_text = "default, reference or OP=NAME,OP=NAME; may be repeated"
    parser.add_argument("--choice", action="append", default=[], metavar="CHOICE", help=help_text)
    parser.add_argument("--batch", type=COUNT, default=1)
    parser.add_argument("--tokens", type=COUNT, default=512, help="of each sequence")
    parser.add_argument("--baseline", choices=("hf", "none"), default="hf", help=HF)
    parser.add_argument("--measure", default=",".join(MEASURES), help="some of these, with commas")
    parser.add_argument("--kept", action="store_true", help="list what autograd keeps of a layer")
    parser.add_argument("--rounds", type=COUNT, default=5)
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    parser.add_argument("--device")
    return parser


@tool
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for given, known in ((args.weights, WEIGHTS), (args.measure, MEASURES)):
        if unknown := ", ".join(x for x in given.split(",") if x not in known):
            raise ValueError(f"no {unknown}; there are: {', '.join(known)}")
    names = args.choice or ["default"]
    for name in names:
        validate_choices(parse_kernel_choices(name))
    names += [HF] if args.baseline == "hf" else []
    device, config = pick_device(args.device), model_configs.load_model(args.model, args.layers)
    if args.tokens > config.llm.max_position_embeddings:
        raise ValueError(f"{args.tokens} tokens, but {config.name} was made for {config.llm.max_position_embeddings}")
    print(f"{config.name}, {config.llm.num_hidden_layers} layers, {rows.stamp(device)['device']}: steps of ", end="")
    print(f"{args.batch} x {args.tokens} tokens\n{HEAD}", flush=True)
    num_refused = 0
    for weights in args.weights.split(","):
        for row in measure(config.llm, weights, names, args, device):
            print(format_row(row), *(kept_lines(row) if args.kept else ()), sep="\n", flush=True)
            num_refused += row["kind"] == "refused"
            if args.out:
                rows.write(args.out, [row])
    return int(num_refused > 0)


if __name__ == "__main__":
    sys.exit(main())
