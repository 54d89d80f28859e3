"""`vila-triton ask` and `vila-triton chat`: questions about pictures."""

import argparse
import io
import os
import sys
import traceback
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any

from vila_triton.arguments import KV_DTYPES, NUMERICS, model_arguments, resolve_device_and_kernels
from vila_triton.console import EXPECTED_ERRORS, print_error
from vila_triton.limits import COUNT, POSITIVE, SEED, Limits

if TYPE_CHECKING:
    from vila_triton.chat.cli_session import CliSession
    from vila_triton.chat.conversation import Conversation


def configure(commands: Any) -> None:
    common = argparse.ArgumentParser(add_help=False, parents=[model_arguments()])
    for media_type in ("image", "video"):  # in the order given
        common.add_argument(
            f"--{media_type}",
            action="append",
            default=[],
            dest="seen",
            type=lambda path, kind=media_type: (kind, path),
            metavar="FILE",
            help="may be given several times",
        )
    common.add_argument("--frames", type=COUNT, help="of each video (default: the model's num_video_frames, else 8)")
    common.add_argument("--kv-dtype", choices=KV_DTYPES, help="of the cache (default: the model's)")
    page_sizes = (16, 32, 64, 128, 256)
    common.add_argument(
        "--page-size", type=int, choices=page_sizes, help="tokens in a page of the cache (default: the model's)"
    )
    common.add_argument(
        "--policy", choices=NUMERICS, help="of attention (default: the model's); invariant: no bit by chance"
    )
    common.add_argument("--max-new-tokens", type=COUNT, help="(default: the model's generation_config.json, else 128)")
    common.add_argument(
        "--temperature",
        type=Limits(float, 0, POSITIVE.maximum),
        help="0 takes the likeliest token (default: the model's generation_config.json, else 0)",
    )
    common.add_argument("--top-k", type=COUNT)
    common.add_argument("--top-p", type=Limits(float, 0, 1, exclude_minimum=True))
    common.add_argument("--seed", type=SEED, help="of what is drawn (default: a new one; the last line says it)")
    ask = commands.add_parser("ask", parents=[common], help="one question about pictures")
    ask.add_argument("question")
    chat_summary = "a conversation; in it: /image, /video, /new, /save, /resume, /quit"
    chat = commands.add_parser("chat", parents=[common], help=chat_summary)
    for parser in (ask, chat):
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    _, kernel_choices = resolve_device_and_kernels(args)
    import torch

    from vila_triton.chat.cli_session import CliSession, default_num_frames, load_media
    from vila_triton.chat.conversation import Conversation
    from vila_triton.hf.chat_model import load_chat_model
    from vila_triton.registry import use

    sampling: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "top_k": args.top_k, "top_p": args.top_p}
    sampling |= {"seed": args.seed}
    if args.temperature is not None:
        sampling |= {"do_sample": args.temperature > 0, "temperature": args.temperature or None}
    if (
        args.command == "ask"
        and args.frames is not None
        and not any(media_type == "video" for media_type, _ in args.seen)
    ):
        raise ValueError(f"--frames {args.frames} is of a --video, and none is given")
    num_frames = default_num_frames(args.model) if args.frames is None else args.frames
    images = load_media(args.seen, num_frames)
    chat_model = load_chat_model(args.model, args.device, getattr(torch, args.dtype) if args.dtype else None)
    do_sample = (
        args.temperature if args.temperature is not None else chat_model.model.generation_settings().get("do_sample")
    )
    if not do_sample and (args.top_k is not None or args.top_p is not None):
        raise ValueError("--top-k and --top-p need a --temperature above 0: without it the likeliest token is taken")
    config = chat_model.model.config
    cache_options = {"kv_dtype": args.kv_dtype, "page_size": args.page_size, "attention_policy": args.policy}
    for name, value in cache_options.items():
        if value is not None:
            setattr(config, name, value)
    session = CliSession(chat_model, Conversation(chat_model), num_frames, images)
    with use(**kernel_choices):
        if args.command == "ask":
            print_answer(session, args.question, sampling)
        else:
            run_chat(session, sampling)


def run_chat(session: "CliSession", sampling: dict[str, Any]) -> None:
    """Lines from standard input until there are no more, or /quit. Whatever goes wrong with one, Ctrl-C included, the
    conversation is then as it was before the line; Ctrl-C in place of a line ends it.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else what is no UTF-8 takes the lines after it with it
    while (line := read_line()) not in (None, "/quit"):
        try:
            if line.startswith("/"):
                session.run_command(line)
            elif line:
                print_answer(session, line, sampling)
        except BrokenPipeError:
            raise
        except (*EXPECTED_ERRORS, KeyboardInterrupt) as error:
            print_error("vila-triton", error)
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


def print_answer(session: "CliSession", question: str, sampling: dict[str, Any]) -> None:
    """Stream one answer to standard output, then say in one line on standard error how it went.

    Errors: ValueError, RuntimeError, KeyboardInterrupt; the conversation is as it was before the question then, and its
    pictures are still to be asked about.
    """
    import torch
    from transformers import TextStreamer

    from vila_triton.registry import count_calls

    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the question is no text in UTF-8, from its character {error.start + 1} on") from None
    conversation = session.conversation
    printer: Any = TextStreamer(conversation.chat_model.tokenizer, skip_special_tokens=True)
    tokens = conversation.ask(question, session.images, **sampling)
    with count_calls() as calls, closing(tokens):
        try:
            for token in tokens:
                printer.put(torch.tensor([token]))
        except BaseException:
            if printer.print_len or printer.token_cache:
                print(flush=True)  # below the part that was said
            raise
    printer.end()
    session.images = []
    stats = conversation.last_turn
    assert stats is not None
    speed = f"{stats.tokens_per_second:.1f} tokens/s" if stats.answer_tokens > 1 else "1 token"
    seed = "" if stats.seed is None else f"seed {stats.seed} | "
    reused = (
        f", {stats.prompt_tokens - stats.prefill_tokens} cached" if stats.prefill_tokens < stats.prompt_tokens else ""
    )
    print(
        f"[prompt {stats.prompt_tokens} tokens{reused} | pictures {stats.image_tokens} tokens | "
        f"first token {stats.seconds_to_first_token:.3f} s | {speed} | "
        f"{generation_config_note(conversation, sampling)}{seed}{kernels_summary(calls)}]",
        file=sys.stderr,
    )


def generation_config_note(conversation: "Conversation", sampling: dict[str, Any]) -> str:
    """What the model's generation_config.json decided about an answer, as nobody else did."""
    from vila_triton.checkpoints.generation_config import GENERATION_CONFIG_NAME, effective_settings

    settings = effective_settings(conversation.chat_model.model.generation_settings(), sampling)
    return (
        f"{', '.join(f'{name} {value}' for name, value in settings.items())} by {GENERATION_CONFIG_NAME} | "
        if settings
        else ""
    )


def kernels_summary(calls: Counter[tuple[str, str]]) -> str:
    """Which implementations ran, the reference ones in one word, and whether Triton kernels were interpreted; also
    for which ops one was chosen that were never called.
    """
    from vila_triton.registry import OPS, explicit_choices
    from vila_triton.registry.interpreter import uses_triton_kernels

    ran = sorted(f"{op}={impl}" for op, impl in calls if impl != "reference")
    ran_triton = any(uses_triton_kernels(OPS[op].impls[impl]) for op, impl in calls)
    interpreted = " (interpreted)" if os.environ.get("TRITON_INTERPRET") == "1" and ran_triton else ""
    ran_text = "reference" if not ran else f"{', '.join(ran)}{interpreted}; else reference"
    unused = sorted({*explicit_choices()} - {op for op, _ in calls})
    return f"kernels: {ran_text}" + (f"; nothing called {', '.join(unused)}" if unused else "")
