"""Predicts the least times of the released models on paper: `python -m bench.roofline --gpu H100,4090`

The least work of a step (bench/measure/step_cost.py) and the rates of a machine bound its time:

    time >= max(bytes / bandwidth, FLOPs / rate), bytes and FLOPs summed over the whole step

The maximum of the sums, and not the sum of each op's maximum: while one op computes, the weights of the next may
already be on their way, so only the former holds however kernels overlap. Rates are those of datasheets
(configs/bench/gpus.toml), or measured ones: `--measured ROWS` takes them from rows of bench.ops.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vila_triton.arguments import OldOption
from vila_triton.limits import COUNT, COUNT_OR_ZERO
from vila_triton.paths import config_dir

from ._tool import tool
from .measure import model_configs, rows, step_cost

GROUPS = {"float16": None, "int4": 128}
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """The rates that bound a time, in bytes and FLOPs per second. `memory` is in bytes, None if it is not known."""

    gpu: str
    name: str
    memory: int | None
    bandwidth: float
    flops: float
    source: str


def datasheet_machines() -> dict[str, Machine]:
    """Returns the machines of configs/bench/gpus.toml."""
    file = config_dir() / "bench" / "gpus.toml"
    return {gpu: Machine(gpu, **values) for gpu, values in tomllib.loads(file.read_text()).items()}


def measured_machines(files: Sequence[Path]) -> list[Machine]:
    """Returns the machines that rows of kind "ceiling" were measured on, by the last row of each; memory is the
    datasheet's.
    """
    machines = {}
    for row in rows.read(*files, kind="ceiling"):
        if missing := [name for name in ("device", "date", "commit", "bandwidth", "flops") if name not in row]:
            raise ValueError(f"a row of kind 'ceiling' has no {', '.join(missing)}")
        if "float16" not in row["flops"]:
            raise ValueError(f"the ceilings of {row['device']} say nothing of float16, only {', '.join(row['flops'])}")
        datasheets = [machine for gpu, machine in datasheet_machines().items() if gpu in row["device"]]
        gpu, memory = (datasheets[0].gpu, datasheets[0].memory) if datasheets else (row["device"], None)
        source = f"measured {row['date']} at {row['commit']}"
        machines[gpu] = Machine(gpu, row["device"], memory, row["bandwidth"], row["flops"]["float16"], source)
    if not machines:
        raise ValueError(f"no row of kind 'ceiling' in {', '.join(map(str, files))}; bench.ops --out writes them")
    return list(machines.values())


def predict_steps(
    machine: Machine,
    model: str,
    weights: str,
    num_images: int,
    prompt_lengths: Sequence[int],
    context_lengths: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Yields a row for every prompt (text tokens beside the images) and every context of one model on one machine,
    batch 1.

    `beyond` of a row says why there is no such step: "memory", or the "positions" that the model was made for.
    """
    config = model_configs.load_model(model, group_size=GROUPS[weights])
    image_tokens = num_images * config.image_tokens
    steps: list[tuple[dict[str, Any], int, step_cost.StepCost]] = [
        (
            {"what": "prefill", "images": num_images, "prompt": text_tokens},
            text_tokens + image_tokens,
            step_cost.prefill_cost(config, text_tokens, num_images),
        )
        for text_tokens in prompt_lengths
    ]
    steps += [({"what": "decode", "context": n}, n, step_cost.decode_cost(config, 1, n)) for n in context_lengths]
    for step, tokens, cost in steps:
        memory_bytes = step_cost.memory_bytes(config, tokens)
        exceeded = "positions" if tokens > config.llm.max_position_embeddings else None
        if machine.memory is not None and memory_bytes > machine.memory:
            exceeded = "memory"
        yield {
            "kind": "predict",
            **step,
            "gpu": machine.gpu,
            "source": machine.source,
            "model": model,
            "weights": weights,
            "batch": 1,
            "tokens": tokens,
            "seconds": cost.seconds(machine.bandwidth, machine.flops),
            "limit": "memory" if cost.bytes / machine.bandwidth > cost.flops / machine.flops else "compute",
            "flops": cost.flops,
            "bytes": cost.bytes,
            "needs": memory_bytes,
            "beyond": exceeded,
            **rows.stamp(torch.device("cpu")),
            "device": "on paper",
        }


def format_cell(row: dict[str, Any]) -> str:
    """Returns milliseconds, with a c where compute is the limit, or the reason why there is no such step."""
    if row["beyond"]:
        return {"memory": "does not fit  ", "positions": "too long  "}[row["beyond"]]
    ms = row["seconds"] * 1e3
    rate = f" ({1 / row['seconds']:.0f}/s)" if row["what"] == "decode" else ""
    return f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f}{rate}{' c' if row['limit'] == 'compute' else '  '}"


def format_heading(machine: Machine, num_images: int, prompts: Sequence[int], contexts: Sequence[int]) -> str:
    """Returns the lines above the table of a machine."""
    memory = "memory unknown" if machine.memory is None else f"{machine.memory / GIB:.0f} GiB"
    rates = f"{machine.bandwidth / 1e9:.5g} GB/s, {machine.flops / 1e12:.4g} TFLOP/s float16"
    first = f"first token, ms: {num_images} image{'s' * (num_images != 1)}, and text tokens:  "
    columns = "".join(f"{n:>14}  " for n in prompts) + "".join(f"{n:>16}  " for n in contexts)
    return (
        f"\n{machine.name}: {memory}, {rates}\n({machine.source})\n"
        f"{'at least':36}{first:>{16 * len(prompts)}}{'a token, ms, attending to tokens:  ':>{18 * len(contexts)}}\n"
        f"{'':20}{'weights':8}{'GiB':>8}{columns}"
    )


def vision_models() -> list[str]:
    """Returns the models with a vision tower, without the bundled one, the smallest first."""
    configs_by_name = {name: model_configs.load_model(name) for name in model_configs.model_files() if name != "tiny"}
    return sorted(
        (name for name, shape in configs_by_name.items() if shape.vision_tower),
        key=lambda n: step_cost.memory_bytes(configs_by_name[n], 0),
    )


def parse_names(text: str, valid: Sequence[str], description: str) -> list[str]:
    """Returns the names of a list with commas. Errors: ValueError for one that is not valid."""
    names = text.split(",")
    if unknown := [name for name in names if name not in valid]:
        raise ValueError(f"no {description} {', '.join(unknown)}; there are: {', '.join(valid)}")
    return names


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help="names of configs/bench/gpus.toml, with commas; default: all")
    parser.add_argument("--measured", type=Path, nargs="+", metavar="ROWS", help="instead: the ceilings of these rows")
    parser.add_argument("--model", default="all", help="names of configs/models, with commas, or all: those released")
    parser.add_argument("--weights", default="float16,int4")
    images = parser.add_argument("--images", type=COUNT_OR_ZERO, default=1)
    parser.add_argument("--pictures", action=OldOption, new=images)
    parser.add_argument(
        "--prompts", type=COUNT, nargs="+", default=[32, 512, 2048], help="text tokens beside the images"
    )
    parser.add_argument("--contexts", type=COUNT, nargs="+", default=[256, 4096], help="tokens a new one attends to")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    if args.gpu and args.measured:
        raise ValueError("--gpu takes datasheets and --measured takes rows; give one of them")
    machines = measured_machines(args.measured) if args.measured else list(datasheet_machines().values())
    if args.gpu:
        machines = [datasheet_machines()[gpu] for gpu in parse_names(args.gpu, list(datasheet_machines()), "GPU")]
    models = (
        vision_models() if args.model == "all" else parse_names(args.model, list(model_configs.model_files()), "model")
    )
    precisions = parse_names(args.weights, list(GROUPS), "weights")
    for machine in machines:
        print(format_heading(machine, args.images, args.prompts, args.contexts))
        for model in models:
            for weights in precisions:
                predictions = list(predict_steps(machine, model, weights, args.images, args.prompts, args.contexts))
                cells = "".join(f"{format_cell(row):>{16 if row['what'] == 'prefill' else 18}}" for row in predictions)
                memory_gib = min(row["needs"] for row in predictions) / GIB
                print(f"{model if weights == precisions[0] else '':20}{weights:8}{memory_gib:8.1f}{cells}", flush=True)
                if args.out:
                    rows.write(args.out, predictions)
    print("\nc: bound by compute, all else by memory. Lower bounds: what runs is slower.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
