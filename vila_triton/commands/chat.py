"""`vila-triton ask` and `vila-triton chat`: questions about pictures."""

import argparse
import io
import os
import sys
import traceback
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any

from vila_triton.arguments import KV_DTYPES, POLICIES, model_arguments, settle
from vila_triton.console import EXPECTED, complain
from vila_triton.limits import COUNT, POSITIVE, SEED, Limits

if TYPE_CHECKING:
    from vila_triton.chat.cli_session import Session
    from vila_triton.chat.conversation import Conversation


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
    talk.add_argument("--frames", type=COUNT, help="of each video (default: the model's num_video_frames, else 8)")
    talk.add_argument("--kv-dtype", choices=KV_DTYPES, help="of the cache (default: the model's)")
    sizes = (16, 32, 64, 128, 256)
    talk.add_argument(
        "--page-size", type=int, choices=sizes, help="tokens in a page of the cache (default: the model's)"
    )
    talk.add_argument(
        "--policy", choices=POLICIES, help="of attention (default: the model's); invariant: no bit by chance"
    )
    talk.add_argument("--max-new-tokens", type=COUNT, help="(default: the model's generation_config.json, else 128)")
    talk.add_argument(
        "--temperature",
        type=Limits(float, 0, POSITIVE.most),
        help="0 takes the likeliest token (default: the model's generation_config.json, else 0)",
    )
    talk.add_argument("--top-k", type=COUNT)
    talk.add_argument("--top-p", type=Limits(float, 0, 1, above=True))
    talk.add_argument("--seed", type=SEED, help="of what is drawn (default: a new one; the last line says it)")
    ask = commands.add_parser("ask", parents=[talk], help="one question about pictures")
    ask.add_argument("question")
    about = "a conversation; in it: /image, /video, /new, /save, /resume, /quit"
    chat = commands.add_parser("chat", parents=[talk], help=about)
    for parser in (ask, chat):
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    _, chosen = settle(args)
    import torch

    from vila_triton.chat.cli_session import Session, frames_of, pictures
    from vila_triton.chat.conversation import Conversation, Talker
    from vila_triton.registry import use

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
            answer(session, args.question, sampling)
        else:
            chat(session, sampling)


def chat(session: "Session", sampling: dict[str, Any]) -> None:
    """Lines from standard input until there are no more, or /quit. Whatever goes wrong with one, Ctrl-C included, the
    conversation is then as it was before the line; Ctrl-C in place of a line ends it.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else what is no UTF-8 takes the lines after it with it
    while (line := read_line()) not in (None, "/quit"):
        try:
            if line.startswith("/"):
                session.obey(line)
            elif line:
                answer(session, line, sampling)
        except BrokenPipeError:
            raise
        except (*EXPECTED, KeyboardInterrupt) as error:
            complain("vila-triton", error)
        except Exception:  # a mistake of ours, which is not to cost what was said so far
            traceback.print_exc()


def read_line() -> str | None:
    """The next line without the blanks around it; None if there are no more."""
    prompt = "> " if sys.stdin and sys.stdin.isatty() else ""
    if not sys.stdout.isatty():  # where `input` would write it to
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def answer(session: "Session", question: str, sampling: dict[str, Any]) -> None:
    """Stream one answer to standard output, then say in one line on standard error how it went.

    Errors: ValueError, RuntimeError, KeyboardInterrupt; the conversation is as it was before the question then, and its
    pictures are still to be asked about.
    """
    import torch
    from transformers import TextStreamer

    from vila_triton.registry import recording

    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the question is no text in UTF-8, from its character {error.start + 1} on") from None
    conversation = session.conversation
    printer: Any = TextStreamer(conversation.talker.tokenizer, skip_special_tokens=True)
    tokens = conversation.ask(question, session.pictures, **sampling)
    with recording() as calls, closing(tokens):
        try:
            for token in tokens:
                printer.put(torch.tensor([token]))
        except BaseException:
            if printer.print_len or printer.token_cache:
                print(flush=True)  # below the part that was said
            raise
    printer.end()
    session.pictures = []
    took = conversation.last
    assert took is not None
    speed = f"{took.tokens_per_second:.1f} tokens/s" if took.answer_tokens > 1 else "1 token"
    seed = "" if took.seed is None else f"seed {took.seed} | "
    reused = f", {took.prompt_tokens - took.new_tokens} cached" if took.new_tokens < took.prompt_tokens else ""
    print(
        f"[prompt {took.prompt_tokens} tokens{reused} | pictures {took.image_tokens} tokens | "
        f"first token {took.first_token:.3f} s | {speed} | "
        f"{by_file(conversation, sampling)}{seed}{kernels_line(calls)}]",
        file=sys.stderr,
    )


def by_file(conversation: "Conversation", sampling: dict[str, Any]) -> str:
    """What the model's generation_config.json decided about an answer, as nobody else did."""
    from vila_triton.engine.generation_config import FILE, decided

    said = decided(conversation.talker.model.answers(), sampling)
    return f"{', '.join(f'{name} {value}' for name, value in said.items())} by {FILE} | " if said else ""


def kernels_line(calls: Counter[tuple[str, str]]) -> str:
    """Which implementations ran, the reference ones in one word, and whether Triton kernels were interpreted; also
    for which ops one was chosen that were never called.
    """
    from vila_triton.registry import OPS, explicit
    from vila_triton.registry.interpreter import holds_kernels

    ran = sorted(f"{op}={impl}" for op, impl in calls if impl != "reference")
    triton = any(holds_kernels(OPS[op].impls[impl]) for op, impl in calls)
    interpreted = " (interpreted)" if os.environ.get("TRITON_INTERPRET") == "1" and triton else ""
    rest = "reference" if not ran else f"{', '.join(ran)}{interpreted}; else reference"
    unused = sorted({*explicit()} - {op for op, _ in calls})
    return f"kernels: {rest}" + (f"; nothing called {', '.join(unused)}" if unused else "")
