"""`vila-triton ask` and `vila-triton chat`: questions about pictures."""

import argparse
import math
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from vila_triton.arguments import KV_DTYPES, POLICIES, model_arguments, settle

if TYPE_CHECKING:
    from vila_triton.chat import Conversation


def configure(commands: Any) -> None:
    talk = argparse.ArgumentParser(add_help=False, parents=[model_arguments()])
    for kind in ("image", "video"):  # in the order given
        talk.add_argument(
            f"--{kind}",
            action="append",
            default=[],
            dest="seen",
            type=lambda path, kind=kind: (kind, path),
            metavar="FILE",
            help="may be given several times",
        )
    talk.add_argument("--frames", type=int, help="of each video (default: the model's num_video_frames, else 8)")
    talk.add_argument("--kv-dtype", choices=KV_DTYPES, help="of the cache (default: the model's)")
    sizes = (16, 32, 64, 128, 256)
    talk.add_argument(
        "--page-size", type=int, choices=sizes, help="tokens in a page of the cache (default: the model's)"
    )
    talk.add_argument(
        "--policy", choices=POLICIES, help="of attention (default: the model's); invariant: no bit by chance"
    )
    talk.add_argument("--max-new-tokens", type=int, help="(default: the model's generation_config.json, else 128)")
    talk.add_argument(
        "--temperature",
        type=float,
        help="0 takes the likeliest token (default: the model's generation_config.json, else 0)",
    )
    talk.add_argument("--top-k", type=int)
    talk.add_argument("--top-p", type=float)
    talk.add_argument("--seed", type=int, default=0)
    ask = commands.add_parser("ask", parents=[talk], help="one question about pictures")
    ask.add_argument("question")
    about = "a conversation; in it: /image, /video, /new, /save, /resume, /quit"
    chat = commands.add_parser("chat", parents=[talk], help=about)
    for parser in (ask, chat):
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    _, chosen = settle(args)
    import torch

    from vila_triton.chat import Conversation, Talker
    from vila_triton.registry import use
    from vila_triton.session import Session, frames_of, pictures

    if args.temperature is not None and not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature is {args.temperature}, expected a number from 0 up")
    sampling: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "top_k": args.top_k, "top_p": args.top_p}
    sampling |= {"seed": args.seed}
    if args.temperature is not None:
        sampling |= {"do_sample": args.temperature > 0, "temperature": args.temperature or None}
    if args.command == "ask" and args.frames is not None and not any(kind == "video" for kind, _ in args.seen):
        raise ValueError(f"--frames {args.frames} is of a --video, and none is given")
    frames = frames_of(args.model) if args.frames is None else args.frames
    seen = pictures(args.seen, frames)
    talker = Talker.from_pretrained(args.model, args.device, getattr(torch, args.dtype) if args.dtype else None)
    draws = args.temperature if args.temperature is not None else talker.model.answers().get("do_sample")
    if not draws and (args.top_k is not None or args.top_p is not None):
        raise ValueError("--top-k and --top-p need a --temperature above 0: without it the likeliest token is taken")
    config = talker.model.config
    given = {"kv_dtype": args.kv_dtype, "page_size": args.page_size, "attention_policy": args.policy}
    for name, value in given.items():
        if value is not None:
            setattr(config, name, value)
    session = Session(talker, Conversation(talker), frames, seen)
    with use(**chosen):
        if args.command == "ask":
            answer(session.conversation, args.question, session.pictures, sampling)
            return
        while (line := read_line()) not in ("", "/quit"):
            try:
                if line.startswith("/"):
                    session.obey(line)
                else:
                    answer(session.conversation, line, session.pictures, sampling)
                    session.pictures = []
            except ValueError as error:  # the conversation is as it was before the line
                print(f"vila-triton: {error}", file=sys.stderr)


def read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def answer(conversation: "Conversation", question: str, pictures: list[Any], sampling: dict[str, Any]) -> None:
    """Stream one answer to standard output, then one line about how it went."""
    import torch
    from transformers import TextStreamer

    from vila_triton.registry import recording

    printer: Any = TextStreamer(conversation.talker.tokenizer, skip_special_tokens=True)
    with recording() as calls:
        for token in conversation.ask(question, pictures, **sampling):
            printer.put(torch.tensor([token]))
    printer.end()
    took = conversation.last
    assert took is not None
    speed = f"{took.tokens_per_second:.1f} tokens/s" if took.answer_tokens > 1 else "1 token"
    reused = f", {took.prompt_tokens - took.new_tokens} cached" if took.new_tokens < took.prompt_tokens else ""
    print(
        f"[prompt {took.prompt_tokens} tokens{reused} | pictures {took.image_tokens} tokens | "
        f"first token {took.first_token:.3f} s | {speed} | {by_file(conversation, sampling)}{kernels_line(calls)}]"
    )


def by_file(conversation: "Conversation", sampling: dict[str, Any]) -> str:
    """What the model's generation_config.json decided about an answer, as nobody else did."""
    from vila_triton.generation_config import FILE, decided

    said = decided(conversation.talker.model.answers(), sampling)
    return f"{', '.join(f'{name} {value}' for name, value in said.items())} by {FILE} | " if said else ""


def kernels_line(calls: Counter[tuple[str, str]]) -> str:
    """Which implementations ran, the reference ones in one word; whether there were Triton kernels, and interpreted."""
    from vila_triton.interpreter import holds_kernels
    from vila_triton.registry import OPS

    ran = sorted(f"{op}={impl}" for op, impl in calls if impl != "reference")
    triton = any(holds_kernels(OPS[op].impls[impl]) for op, impl in calls)
    interpreted = " (interpreted)" if os.environ.get("TRITON_INTERPRET") == "1" and triton else ""
    rest = "reference" if not ran else f"{', '.join(ran)}{interpreted}; else reference"
    return f"kernels: {rest}"
