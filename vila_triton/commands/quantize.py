"""`vila-triton quantize`: a VILA in fp16 to one whose language model is int4, and what sees if asked for."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROUPS = (32, 64, 128)
PARTS = ("vision_tower", "mm_projector")
FORMS = ("ours", "awq-gemm", "awq-v1", "awq-v2")


def configure(commands: Any) -> None:
    about = "a VILA in fp16 to one whose language model is int4"
    more = "Killed, the same command goes on from there. A report and a picture of it are written beside the weights."
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
        help='texts, one a line, or .jsonl of {"text": ...} and {"image": ..., "question": ..., "answer": ...} '
        "(default: drawn pictures, questions and answers; also pages of Python's manual if the model knows its words)",
    )
    parser.add_argument("--samples", type=int, default=128, help="of calibration, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    parser.add_argument("--image-weight", type=float, default=1.0, help="a picture's token for each 1 of a word")
    parser.add_argument("--no-propagate", action="store_true", help="later layers do not see earlier ones' errors")
    parser.add_argument("--awq-cache", type=Path, metavar="FILE.pt", help="llm-awq's scales and clips; no search")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    from vila_triton.awq import cachefile, report
    from vila_triton.awq import run as awq
    from vila_triton.awq import work as folder
    from vila_triton.checkpoint import geometry, open_source
    from vila_triton.choices import pick_device
    from vila_triton.shards import SHARD_BYTES
    from vila_triton.write import write

    from .convert import progress

    if args.awq_cache and (args.mode != "upstream" or args.method != "awq"):
        raise ValueError("--awq-cache holds what mode upstream finds; give --mode upstream too")
    if args.samples < 1:
        raise ValueError(f"--samples is {args.samples}, expected at least 1")
    source, device = open_source(args.source), pick_device(args.device)
    also = tuple(dict.fromkeys(args.also))
    how = folder.How(args.mode, args.group_size, not args.no_propagate, args.image_weight, also)
    cfg = geometry(source.top, awq.opened(source, how).parts)
    if args.method == "rtn":
        write(awq.nearest(source, how), args.target, args.format, progress=progress())
        print(f"{args.target}: written, every weight at its nearest level in groups of {how.group}")
        return
    work = args.target.with_name(f"{args.target.name}.quantizing")
    if args.target.exists() and not work.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        raise ValueError(f"{args.target} is there already and not empty; give another folder, or remove it")
    found = cachefile.load(args.awq_cache, cfg.llm.num_hidden_layers) if args.awq_cache else None
    shown, said = calibration(args, source, cfg)
    words = sum(map(len, shown.rows))
    print(f"calibration: {said}; {words} tokens, {sum(int((row < 0).sum()) for row in shown.rows)} of pictures")
    made = awq.run(source, work, how, shown, device, telling(), found)
    if not (args.target / "config.json").exists():
        write(
            made, args.target, args.format, limit=SHARD_BYTES, progress=progress(), key=(work / "work.json").read_text()
        )
    about = {"method": args.method, "mode": how.mode, "group": how.group, "calibration": said, "tokens": words}
    about |= {"seed": args.seed, "propagate": how.propagate, "image_weight": how.image_weight, "also": list(also)}
    report.write(args.target, about, {part: folder.reports(work, part) for part in ("llm", *how.also)})
    if how.mode == "upstream":
        awq.save_cache(work, args.target / "awq_cache.pt", torch.float16)
    folder.finish(work)
    print(f"{args.target}: written, with quantization.json and quantization.svg")


def calibration(args: argparse.Namespace, source: Any, cfg: Any) -> tuple[Any, str]:
    """Prompts, and in words what they are."""
    from vila_triton.awq import calibration as of
    from vila_triton.images import image_processor
    from vila_triton.models.vila_llama_config import VilaLlamaConfig
    from vila_triton.prompts import load_tokenizer

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
    """Says on standard error which layer it is at, and how long the rest will take."""
    begun, first = time.monotonic(), list[int]()

    def say(done: int, total: int) -> None:
        first.append(done)
        each = (time.monotonic() - begun) / max(1, done - first[0])
        left = f", {each:.1f} s each, {each * (total - done):.0f} s left" if done > first[0] else ""
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} layers{left}          ", end=end, file=sys.stderr, flush=True)

    return say
