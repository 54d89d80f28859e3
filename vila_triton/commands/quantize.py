"""`vila-triton quantize`: the language model of a VILA to int4, and if asked for the vision tower and the projector."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_triton.arguments import (
    OldOption,
    add_command,
    add_kernels_argument,
    discover_kernels,
    note_new_spelling,
    renamed_values,
)
from vila_triton.console import Progress
from vila_triton.limits import COUNT, SEED, Limits

from .convert import FORMATS, add_format_argument, byte_progress

if TYPE_CHECKING:
    from vila_triton.checkpoints.sources import CheckpointSource
    from vila_triton.models.config import VilaConfig
    from vila_triton.quantization.calibration_data import CalibrationSet

QUESTION = "How do I get the checkpoint that I want?"
SUMMARIES = {"quantize": "quantize a checkpoint to int4"}
METHODS = ("awq-gptq", "llm-awq", "rtn")
OLD_MODES = {"ours": "awq-gptq", "upstream": "llm-awq"}  # --mode -> --method
GROUP_SIZES = (32, 64, 128)
EXTRA_PARTS = ("vision_tower", "mm_projector")
DETAILS = """A run that was killed is resumed by the same command. quantization.json, and a plot of it in
quantization.svg, are written beside the weights."""
CALIBRATION_FILES = """Calibration files hold texts, one a line (512 tokens of each), or in .jsonl objects {"text": ...}
and {"image": ..., "question": ..., "answer": ...}. Pages of Python's manual need a tokenizer with its words."""
INT4_FORMATS = tuple(name for name in FORMATS if name != "dense")
# What the options that --method rtn makes no use of are when they are left out.
CALIBRATION_DEFAULTS = {"calib": None, "samples": 128, "seed": 0, "image_weight": 1.0, "no_error_propagation": False}


def configure(commands: Any) -> None:
    """Add the parser of `vila-triton quantize` to the commands."""
    parser = add_command(commands, "quantize", SUMMARIES["quantize"], DETAILS, epilog=CALIBRATION_FILES)
    parser.add_argument("source", type=Path, help="a checkpoint folder in fp16")
    parser.add_argument("target", type=Path, help="a folder that does not exist yet")
    what = parser.add_argument_group("what is written")
    methods = "awq-gptq (the default), llm-awq (with its objective) or rtn (round to nearest)"
    what.add_argument(
        "--method",
        type=renamed_values({"awq": "awq-gptq"}),
        choices=METHODS,
        default="awq-gptq",
        metavar="METHOD",
        help=methods,
    )
    what.add_argument("--mode", choices=("ours", "upstream"), help=argparse.SUPPRESS)  # the old way to say --method
    sizes = "inputs that share a scale: 32, 64 or 128 (default: 128)"
    what.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128, metavar="N", help=sizes)
    parts = "to quantize besides the language model: vision_tower, mm_projector"
    extra = what.add_argument("--extra-parts", nargs="+", choices=EXTRA_PARTS, default=(), metavar="PART", help=parts)
    what.add_argument("--also", action=OldOption, new=extra)
    add_format_argument(what, INT4_FORMATS)

    how = parser.add_argument_group("calibration, which rtn does without")
    files = "of samples (default: questions about synthetic images, and pages of Python's manual)"
    how.add_argument("--calib", type=Path, nargs="+", metavar="FILE", help=files)
    samples = CALIBRATION_DEFAULTS["samples"]
    how.add_argument(
        "--samples", type=COUNT, default=samples, metavar="N", help=f"samples at most (default: {samples})"
    )
    how.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the choice of samples (default: 0)")
    weight = "how much an image token counts for each 1 of a text token (default: 1)"
    how.add_argument("--image-weight", type=Limits(float, 0, 1e6), default=1.0, metavar="W", help=weight)
    independent = "quantize each layer as if those before it were exact"
    no_propagation = how.add_argument("--no-error-propagation", action="store_true", help=independent)
    how.add_argument("--no-propagate", action=OldOption, new=no_propagation)
    cache = "apply the scales and clips of llm-awq's search instead of searching"
    how.add_argument("--awq-cache", type=Path, metavar="FILE.pt", help=cache)
    how.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    add_kernels_argument(how)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Quantize the checkpoint and write it with its report; an interrupted run continues from its work folder."""
    from vila_triton.checkpoints.atomic_folder import require_free
    from vila_triton.checkpoints.loading import build_vila_config, open_checkpoint
    from vila_triton.checkpoints.writing import write_checkpoint
    from vila_triton.device import pick_device
    from vila_triton.files.file_locks import FolderInUseError
    from vila_triton.quantization import pipeline, report, resumable
    from vila_triton.quantization.awq_cache_file import load_awq_cache
    from vila_triton.quantization.config import QuantizeConfig

    check_options(args)
    discover_kernels(args)
    source, device, target = open_checkpoint(args.source), pick_device(args.device), args.target.absolute()
    group_size, extra_parts = args.group_size, tuple(sorted(set(args.extra_parts)))
    propagates = not args.no_error_propagation
    method = "awq-gptq" if args.method == "rtn" else args.method
    config = QuantizeConfig(method, group_size, propagates, args.image_weight, extra_parts)
    vila_config = build_vila_config(source.config, pipeline.prepare_source(source, config).part_configs)
    work = target.with_name(f"{target.name}.quantizing")
    summary: dict[str, Any] = {"method": args.method, "group_size": group_size}
    summary |= {"format": args.format, "extra_parts": list(extra_parts)}
    if args.method == "rtn":
        if work.exists():
            raise FolderInUseError.other_work(work)
        quantized = pipeline.round_to_nearest(source, config)
        write_checkpoint(
            quantized,
            target,
            args.format,
            progress=byte_progress(),
            write_extra=lambda folder: report.write_report(folder, summary, {}),
        )
        print(f"{args.target}: written, every weight rounded to nearest in groups of {group_size}")
        return
    already_written = resumable.already_written(work, target, args.format)
    if not already_written:
        require_free(target)
    awq_cache = None
    if args.awq_cache:
        dtype = resumable.part_dtype(source, "llm")
        awq_cache = load_awq_cache(args.awq_cache, vila_config.llm, group_size, dtype)
    calibration, description = load_calibration(args, source, vila_config)
    num_tokens = sum(map(len, calibration.sequences))
    num_image_tokens = sum(int((ids < 0).sum()) for ids in calibration.sequences)
    summary |= {"seed": args.seed, "propagate_error": propagates and args.method == "awq-gptq"}
    summary |= {"image_weight": config.image_weight, "tokens": num_tokens, "calibration": description}
    print(f"calibration: {description}; {num_tokens} tokens, {num_image_tokens} of images")
    if calibration.pixel_values is not None and extra_parts:
        summary["images"] = pipeline.calibration_image_counts(vila_config, config, calibration.pixel_values)
        for part, n in summary["images"].items():
            print(f"{part}: by {n} of {len(calibration.pixel_values)} images")
    progress = Progress(unit=" layers")
    quantized = pipeline.quantize_checkpoint(source, work, config, calibration, device, progress, awq_cache)

    def write_extra(folder: Path) -> None:
        parts = {part: resumable.read_reports(work, part) for part in ("llm", *extra_parts)}
        report.write_report(folder, summary | {"work": resumable.read_work_key(work)}, parts)
        if args.method == "llm-awq":
            pipeline.save_cache(work, folder / "awq_cache.pt")

    if not already_written:
        key = resumable.read_work_key(work)
        write_checkpoint(
            quantized, target, args.format, progress=byte_progress(), source_key=key, write_extra=write_extra
        )
    resumable.remove_work_folder(work)
    print(f"{args.target}: written, with quantization.json and quantization.svg")


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that would have no effect, and take the old --mode for --method."""
    if args.mode:
        note_new_spelling(f"--mode {args.mode}", f"--method {OLD_MODES[args.mode]}")
        if args.method == "rtn" and args.mode == "upstream":
            raise ValueError("--method rtn looks at no input and leaves nothing to choose: --mode would do nothing")
        args.method = args.method if args.method == "rtn" else OLD_MODES[args.mode]
    if args.awq_cache and args.method != "llm-awq":
        raise ValueError("--awq-cache holds what llm-awq's search finds; give --method llm-awq too")
    useless = [name for name, default in CALIBRATION_DEFAULTS.items() if getattr(args, name) != default]
    if args.method == "rtn" and useless:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        raise ValueError(f"--method rtn looks at no input and leaves nothing to choose: {names} would do nothing")
    if args.method == "llm-awq" and args.no_error_propagation:
        raise ValueError("--method llm-awq propagates no errors: --no-error-propagation would do nothing")


def load_calibration(
    args: argparse.Namespace, source: "CheckpointSource", vila_config: "VilaConfig"
) -> tuple["CalibrationSet", str]:
    """Return the calibration set that the options ask for, and a description of it."""
    from vila_triton.chat.tokenizer import load_tokenizer
    from vila_triton.hf.configuration_vila_llama import VilaLlamaConfig
    from vila_triton.images.processing import load_image_processor
    from vila_triton.quantization import calibration_data

    tokenizer = load_tokenizer(source.companion_dirs["llm"])
    part_configs = {f"{part}_cfg": values for part, values in source.part_configs.items()}
    if args.calib:
        samples = calibration_data.sample_subset(
            list(calibration_data.read_samples(args.calib)), args.samples, args.seed
        )
        description = f"{len(samples)} samples of {', '.join(file.name for file in args.calib)}"
    else:
        pages = calibration_data.python_manual_samples(args.samples // 2, args.seed)
        ids = tokenizer(pages[0].text).input_ids if pages else []
        if ids.count(tokenizer.unk_token_id) >= len(ids) / 10:
            pages = []  # a tokenizer that lacks the words of the manual
        samples = calibration_data.synthetic_samples(args.samples - len(pages), args.seed)
        description = f"{len(samples)} questions about synthetic images"
        if pages:
            samples, description = samples + pages, f"{description}, {len(pages)} pages of Python's manual"
    processor = load_image_processor(source.folder) if any(sample.images for sample in samples) else None
    config = VilaLlamaConfig(**{**source.config, **part_configs})
    image_tokens = vila_config.tokens_per_image
    return calibration_data.build_calibration_set(samples, tokenizer, processor, config, image_tokens), description
