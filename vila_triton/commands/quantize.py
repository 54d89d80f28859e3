"""`vila-triton quantize`: a VILA in fp16 to one whose language model is int4, and what sees if asked for."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vila_triton.console import print_progress
from vila_triton.limits import COUNT, SEED, Limits

GROUP_SIZES = (32, 64, 128)
PARTS = ("vision_tower", "mm_projector")
FORMATS = ("ours", "awq-gemm", "awq-v1", "awq-v2")
DEFAULT_SAMPLES = 128


def configure(commands: Any) -> None:
    summary = "a VILA in fp16 to one whose language model is int4"
    details = "Killed, the same command goes on from there. A report and its picture are written beside the weights."
    parser = commands.add_parser("quantize", help=summary, description=f"Quantize {summary}. {details}")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    parser.add_argument("--method", choices=("awq", "rtn"), default="awq", help="rtn: round to nearest, see no input")
    parser.add_argument("--mode", choices=("ours", "upstream"), default="ours", help="upstream: llm-awq's objective")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128, help="inputs that share a scale")
    parser.add_argument("--also", nargs="+", choices=PARTS, default=(), help="parts that are rounded too (none)")
    parser.add_argument("--format", choices=FORMATS, default="ours", help="the layout of the int4 linears")
    parser.add_argument(
        "--calib",
        type=Path,
        nargs="+",
        metavar="FILE",
        help='texts, one a line (512 tokens of it), or .jsonl of {"text": ...} and '
        '{"image": ..., "question": ..., "answer": ...} '
        "(default: drawn pictures, questions and answers; also pages of Python's manual if the model knows its words)",
    )
    parser.add_argument("--samples", type=COUNT, default=DEFAULT_SAMPLES, help="of calibration, at most")
    parser.add_argument("--seed", type=SEED, default=0, help="of the choice of samples")
    parser.add_argument(
        "--image-weight", type=Limits(float, 0, 1e6), default=1.0, help="a picture's token for each 1 of a word"
    )
    parser.add_argument("--no-propagate", action="store_true", help="later layers do not see earlier ones' errors")
    parser.add_argument("--awq-cache", type=Path, metavar="FILE.pt", help="llm-awq's scales and clips; no search")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from vila_triton.checkpoints.loading import build_vila_config, open_checkpoint
    from vila_triton.checkpoints.writing import write_checkpoint
    from vila_triton.device import pick_device
    from vila_triton.quantization import awq_cache_file, report
    from vila_triton.quantization import pipeline as awq
    from vila_triton.quantization import resumable as folder

    from .convert import byte_progress

    check_options(args)
    source, device, target = open_checkpoint(args.source), pick_device(args.device), args.target.absolute()
    config = folder.QuantizeConfig(
        args.mode, args.group_size, not args.no_propagate, args.image_weight, tuple(sorted(set(args.also)))
    )
    vila_config = build_vila_config(source.config, awq.prepare_source(source, config).part_configs)
    work_folder = target.with_name(f"{target.name}.quantizing")
    report_header = {
        "method": args.method,
        "group": config.group_size,
        "format": args.format,
        "also": list(config.extra_parts),
    }
    if args.method == "rtn":
        if work_folder.exists():
            raise ValueError(f"{work_folder} holds the beginnings of other work; remove it, or write elsewhere")

        def write_rtn_report(directory: Path) -> None:
            report.write_report(directory, report_header, {})

        write_checkpoint(
            awq.round_to_nearest(source, config),
            target,
            args.format,
            progress=byte_progress(),
            write_extra=write_rtn_report,
        )
        print(f"{args.target}: written, every weight at its nearest level in groups of {config.group_size}")
        return
    target_exists = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if target_exists and not folder.already_written(work_folder, target, args.format):
        raise ValueError(f"{target} is there already and not empty; give another folder, or remove it")
    dtype = folder.part_dtype(source, "llm")
    search_results = (
        awq_cache_file.load_awq_cache(args.awq_cache, vila_config.llm, config.group_size, dtype)
        if args.awq_cache
        else None
    )
    calibration_set, calibration_text = load_calibration(args, source, vila_config)
    num_tokens, num_image_tokens = (
        sum(map(len, calibration_set.rows)),
        sum(int((row < 0).sum()) for row in calibration_set.rows),
    )
    report_header |= {
        "mode": config.mode,
        "seed": args.seed,
        "propagate": config.propagate_error and config.mode == "ours",
    }
    report_header |= {"image_weight": config.image_weight, "tokens": num_tokens, "calibration": calibration_text}
    print(f"calibration: {calibration_text}; {num_tokens} tokens, {num_image_tokens} of pictures")
    if calibration_set.pixels is not None and config.extra_parts:
        report_header["pictures"] = awq.calibration_image_counts(vila_config, config, calibration_set.pixels)
        print(
            *(
                f"{part}: by {n} of {len(calibration_set.pixels)} pictures"
                for part, n in report_header["pictures"].items()
            ),
            sep="\n",
        )
    quantized = awq.quantize_checkpoint(
        source, work_folder, config, calibration_set, device, layer_progress(), search_results
    )

    def write_extra(directory: Path) -> None:
        parts = {part: folder.read_reports(work_folder, part) for part in ("llm", *config.extra_parts)}
        report.write_report(directory, report_header | {"work": folder.read_work_key(work_folder)}, parts)
        if config.mode == "upstream":
            awq.save_cache(work_folder, directory / "awq_cache.pt")

    if not target_exists:
        write_checkpoint(
            quantized,
            target,
            args.format,
            progress=byte_progress(),
            source_key=folder.read_work_key(work_folder),
            write_extra=write_extra,
        )
    folder.remove_work_folder(work_folder)
    print(f"{args.target}: written, with quantization.json and quantization.svg")


def check_options(args: argparse.Namespace) -> None:
    """Errors: ValueError for options that do not go together, none of which would change anything."""
    if args.awq_cache and (args.mode != "upstream" or args.method != "awq"):
        raise ValueError("--awq-cache holds what mode upstream finds; give --mode upstream too")
    defaults = {
        "calib": None,
        "samples": DEFAULT_SAMPLES,
        "seed": 0,
        "image_weight": 1.0,
        "no_propagate": False,
        "mode": "ours",
    }
    if args.method == "rtn" and (
        useless := [name for name, default in defaults.items() if getattr(args, name) != default]
    ):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        raise ValueError(f"--method rtn looks at no input and leaves nothing to choose: {names} would do nothing")
    if args.mode == "upstream" and args.no_propagate:
        raise ValueError("--mode upstream carries no errors on: --no-propagate would do nothing")


def load_calibration(args: argparse.Namespace, source: Any, vila_config: Any) -> tuple[Any, str]:
    """Prompts, and in words what they are."""
    from vila_triton.chat.tokenizer import load_tokenizer
    from vila_triton.hf.configuration_vila_llama import VilaLlamaConfig
    from vila_triton.images.processing import load_image_processor
    from vila_triton.quantization import calibration_data as of

    tokenizer = load_tokenizer(source.beside["llm"])
    config = VilaLlamaConfig(**{**source.top, **{f"{part}_cfg": values for part, values in source.parts.items()}})
    if args.calib:
        samples = of.sample_subset(list(of.read_samples(args.calib)), args.samples, args.seed)
        description = f"{len(samples)} samples of {', '.join(file.name for file in args.calib)}"
    else:
        manual_pages = of.python_manual_samples(args.samples // 2, args.seed)
        ids = tokenizer(manual_pages[0].text).input_ids if manual_pages else []
        uses_manual = bool(manual_pages) and ids.count(tokenizer.unk_token_id) < len(ids) / 10
        synthetic = of.synthetic_samples(args.samples - len(manual_pages) * uses_manual, args.seed)
        samples = synthetic + manual_pages * uses_manual
        description = (
            f"{len(synthetic)} questions about drawn pictures"
            + f", {len(manual_pages)} pages of Python's manual" * uses_manual
        )
    processor = load_image_processor(source.folder) if any(sample.images for sample in samples) else None
    return of.build_calibration_set(samples, tokenizer, processor, config, vila_config.image_tokens), description


def layer_progress() -> Callable[[int, int], None]:
    """Says on a terminal which layer it is at, and how long the rest will take."""
    start_time, first_done = time.monotonic(), list[int]()

    def show(done: int, total: int) -> None:
        first_done.append(done)
        seconds_per_layer = (time.monotonic() - start_time) / max(1, done - first_done[0])
        remaining = (
            f", {seconds_per_layer:.1f} s each, {seconds_per_layer * (total - done):.0f} s left"
            if done > first_done[0]
            else ""
        )
        print_progress(f"{done} of {total} layers{remaining}", done == total)

    return show
