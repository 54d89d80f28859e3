"""`vila-triton quantize`: a VILA in fp16 to one whose language model is int4, and what sees if asked for."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vila_triton.console import bar
from vila_triton.limits import COUNT, SEED, Limits

GROUPS = (32, 64, 128)
PARTS = ("vision_tower", "mm_projector")
FORMS = ("ours", "awq-gemm", "awq-v1", "awq-v2")
SAMPLES = 128


def configure(commands: Any) -> None:
    about = "a VILA in fp16 to one whose language model is int4"
    more = "Killed, the same command goes on from there. A report and its picture are written beside the weights."
    parser = commands.add_parser("quantize", help=about, description=f"Quantize {about}. {more}")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    parser.add_argument("--method", choices=("awq", "rtn"), default="awq", help="rtn: round to nearest, see no input")
    parser.add_argument("--mode", choices=("ours", "upstream"), default="ours", help="upstream: llm-awq's objective")
    parser.add_argument("--group-size", type=int, choices=GROUPS, default=128, help="inputs that share a scale")
    parser.add_argument("--also", nargs="+", choices=PARTS, default=(), help="parts that are rounded too (none)")
    parser.add_argument("--format", choices=FORMS, default="ours", help="the layout of the int4 linears")
    parser.add_argument(
        "--calib",
        type=Path,
        nargs="+",
        metavar="FILE",
        help='texts, one a line (512 tokens of it), or .jsonl of {"text": ...} and '
        '{"image": ..., "question": ..., "answer": ...} '
        "(default: drawn pictures, questions and answers; also pages of Python's manual if the model knows its words)",
    )
    parser.add_argument("--samples", type=COUNT, default=SAMPLES, help="of calibration, at most")
    parser.add_argument("--seed", type=SEED, default=0, help="of the choice of samples")
    parser.add_argument(
        "--image-weight", type=Limits(float, 0, 1e6), default=1.0, help="a picture's token for each 1 of a word"
    )
    parser.add_argument("--no-propagate", action="store_true", help="later layers do not see earlier ones' errors")
    parser.add_argument("--awq-cache", type=Path, metavar="FILE.pt", help="llm-awq's scales and clips; no search")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from vila_triton.checkpoints.loading import geometry, open_source
    from vila_triton.checkpoints.writing import write
    from vila_triton.quantization import awq_cache_file, report
    from vila_triton.quantization import pipeline as awq
    from vila_triton.quantization import resumable as folder
    from vila_triton.registry.kernel_config import pick_device

    from .convert import progress

    check(args)
    source, device, target = open_source(args.source), pick_device(args.device), args.target.absolute()
    how = folder.How(
        args.mode, args.group_size, not args.no_propagate, args.image_weight, tuple(sorted(set(args.also)))
    )
    cfg = geometry(source.top, awq.opened(source, how).parts)
    work = target.with_name(f"{target.name}.quantizing")
    about = {"method": args.method, "group": how.group, "format": args.format, "also": list(how.also)}
    if args.method == "rtn":
        if work.exists():
            raise ValueError(f"{work} holds the beginnings of other work; remove it, or write elsewhere")

        def said(at: Path) -> None:
            report.write(at, about, {})

        write(awq.nearest(source, how), target, args.format, progress=progress(), beside=said)
        print(f"{args.target}: written, every weight at its nearest level in groups of {how.group}")
        return
    there = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if there and not folder.wrote(work, target, args.format):
        raise ValueError(f"{target} is there already and not empty; give another folder, or remove it")
    kind = folder.dtype_of(source, "llm")
    found = awq_cache_file.load(args.awq_cache, cfg.llm, how.group, kind) if args.awq_cache else None
    shown, words = calibration(args, source, cfg)
    tokens, seen = sum(map(len, shown.rows)), sum(int((row < 0).sum()) for row in shown.rows)
    about |= {"mode": how.mode, "seed": args.seed, "propagate": how.propagate and how.mode == "ours"}
    about |= {"image_weight": how.image_weight, "tokens": tokens, "calibration": words}
    print(f"calibration: {words}; {tokens} tokens, {seen} of pictures")
    if shown.pixels is not None and how.also:
        about["pictures"] = awq.looked_at(cfg, how, shown.pixels)
        print(*(f"{part}: by {n} of {len(shown.pixels)} pictures" for part, n in about["pictures"].items()), sep="\n")
    made = awq.run(source, work, how, shown, device, telling(), found)

    def beside(at: Path) -> None:
        parts = {part: folder.reports(work, part) for part in ("llm", *how.also)}
        report.write(at, about | {"work": folder.key_of(work)}, parts)
        if how.mode == "upstream":
            awq.save_cache(work, at / "awq_cache.pt")

    if not there:
        write(made, target, args.format, progress=progress(), key=folder.key_of(work), beside=beside)
    folder.finish(work)
    print(f"{args.target}: written, with quantization.json and quantization.svg")


def check(args: argparse.Namespace) -> None:
    """Errors: ValueError for options that do not go together, none of which would change anything."""
    if args.awq_cache and (args.mode != "upstream" or args.method != "awq"):
        raise ValueError("--awq-cache holds what mode upstream finds; give --mode upstream too")
    blind = {"calib": None, "samples": SAMPLES, "seed": 0, "image_weight": 1.0, "no_propagate": False, "mode": "ours"}
    if args.method == "rtn" and (given := [name for name, usual in blind.items() if getattr(args, name) != usual]):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--method rtn looks at no input and leaves nothing to choose: {names} would do nothing")
    if args.mode == "upstream" and args.no_propagate:
        raise ValueError("--mode upstream carries no errors on: --no-propagate would do nothing")


def calibration(args: argparse.Namespace, source: Any, cfg: Any) -> tuple[Any, str]:
    """Prompts, and in words what they are."""
    from vila_triton.chat.tokenizer import load_tokenizer
    from vila_triton.hf.configuration_vila_llama import VilaLlamaConfig
    from vila_triton.images.processing import image_processor
    from vila_triton.quantization import calibration_data as of

    tokenizer = load_tokenizer(source.beside["llm"])
    config = VilaLlamaConfig(**{**source.top, **{f"{part}_cfg": values for part, values in source.parts.items()}})
    if args.calib:
        samples = of.choose(list(of.read(args.calib)), args.samples, args.seed)
        said = f"{len(samples)} samples of {', '.join(file.name for file in args.calib)}"
    else:
        pages = of.manual(args.samples // 2, args.seed)
        ids = tokenizer(pages[0].text).input_ids if pages else []
        spelled = bool(pages) and ids.count(tokenizer.unk_token_id) < len(ids) / 10
        drawn = of.drawn(args.samples - len(pages) * spelled, args.seed)
        samples = drawn + pages * spelled
        said = f"{len(drawn)} questions about drawn pictures" + f", {len(pages)} pages of Python's manual" * spelled
    processor = image_processor(source.folder) if any(sample.pictures for sample in samples) else None
    return of.prompts(samples, tokenizer, processor, config, cfg.image_tokens), said


def telling() -> Callable[[int, int], None]:
    """Says on a terminal which layer it is at, and how long the rest will take."""
    begun, first = time.monotonic(), list[int]()

    def say(done: int, total: int) -> None:
        first.append(done)
        each = (time.monotonic() - begun) / max(1, done - first[0])
        left = f", {each:.1f} s each, {each * (total - done):.0f} s left" if done > first[0] else ""
        bar(f"{done} of {total} layers{left}", done == total)

    return say
