"""`vila-triton ask` and `vila-triton chat`: questions about images and videos."""

import argparse
import io
import os
import sys
import traceback
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any

from vila_triton.arguments import (
    KV_DTYPES,
    NUMERICS,
    OldOption,
    add_command,
    emulated_gpu,
    model_arguments,
    renamed_values,
    resolve_device_and_kernels,
)
from vila_triton.console import EXPECTED_ERRORS, print_error
from vila_triton.limits import COUNT, POSITIVE, SEED, Limits

if TYPE_CHECKING:
    from vila_triton.chat.cli_session import CliSession
    from vila_triton.chat.conversation import Conversation


QUESTION = "What is in my images?"
SUMMARIES = {
    "ask": "answer one question about images and videos",
    "chat": "hold a conversation; in it: /image, /video, /new, /save, /resume, /quit",
}


def configure(commands: Any) -> None:
    """Add the parsers of `vila-triton ask` and `vila-triton chat` to the commands."""
    common = argparse.ArgumentParser(add_help=False, parents=[model_arguments()])
    media = common.add_argument_group("what is asked about")
    for media_type in ("image", "video"):  # one list, which keeps the order
        media.add_argument(
            f"--{media_type}",
            action="append",
            default=[],
            dest="media",
            type=lambda path, media_type=media_type: (media_type, path),
            metavar="FILE",
            help=f"a file with {'an image' if media_type == 'image' else 'a video (GIF, WebP, APNG)'}; may be repeated",
        )
    frames = "frames of each video (default: num_video_frames in config.json, else 8)"
    media.add_argument("--frames", type=COUNT, metavar="N", help=frames)

    cache = common.add_argument_group("how the KV cache is kept (defaults: as in config.json)")
    sizes = (16, 32, 64, 128, 256)
    kv_dtypes = f"of cached keys and values: {', '.join(KV_DTYPES)}"
    cache.add_argument("--kv-dtype", choices=KV_DTYPES, metavar="DTYPE", help=kv_dtypes)
    page_sizes = f"tokens in a page: {', '.join(map(str, sizes))}"
    cache.add_argument("--page-size", type=int, choices=sizes, metavar="N", help=page_sizes)
    numerics = cache.add_argument(
        "--numerics",
        type=renamed_values({"invariant": "batch_invariant"}),
        choices=NUMERICS,
        metavar="NUMERICS",
        help="fast, or batch_invariant: logits are bitwise equal in any batch, chunking and page layout",
    )
    cache.add_argument("--policy", action=OldOption, new=numerics)

    sampling = common.add_argument_group("how answers are sampled (defaults: as in the model's generation_config.json)")
    sampling.add_argument("--max-new-tokens", type=COUNT, metavar="N", help="length of an answer at most (else 128)")
    temperature = Limits(float, 0, POSITIVE.maximum)
    sampling.add_argument("--temperature", type=temperature, metavar="T", help="0 is greedy (else 0)")
    sampling.add_argument("--top-k", type=COUNT, metavar="N", help="sample from this many tokens")
    nucleus = Limits(float, 0, 1, exclude_minimum=True)
    probability = "sample from the likeliest tokens of this probability"
    sampling.add_argument("--top-p", type=nucleus, metavar="P", help=probability)
    seed = "of the sampling (default: a new one; the last line says it)"
    sampling.add_argument("--seed", type=SEED, metavar="N", help=seed)

    parsers = {name: add_command(commands, name, summary, parents=[common]) for name, summary in SUMMARIES.items()}
    parsers["ask"].add_argument("question", help="may hold <image> for each image; else they stand before it")
    for parser in parsers.values():
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load the model and the images, then answer one question (`ask`) or hold a conversation (`chat`).

    Raises ValueError for options that contradict each other.
    """
    _, kernel_choices = resolve_device_and_kernels(args)
    import torch

    from vila_triton.chat.cli_session import CliSession, default_num_frames, load_media
    from vila_triton.chat.conversation import Conversation
    from vila_triton.hf.chat_model import load_chat_model
    from vila_triton.registry import use

    sampling: dict[str, Any] = {name: getattr(args, name) for name in ("max_new_tokens", "top_k", "top_p", "seed")}
    if args.temperature is not None:
        sampling |= {"do_sample": args.temperature > 0, "temperature": args.temperature or None}
    has_video = any(media_type == "video" for media_type, _ in args.media)
    if args.command == "ask" and args.frames is not None and not has_video:
        raise ValueError(f"--frames {args.frames} is of a --video, and none is given")
    num_frames = default_num_frames(args.model) if args.frames is None else args.frames
    images = load_media(args.media, num_frames)
    chat_model = load_chat_model(args.model, args.device, getattr(torch, args.dtype) if args.dtype else None)
    config, settings = chat_model.model.config, chat_model.model.generation_settings()
    do_sample = args.temperature if args.temperature is not None else settings.get("do_sample")
    if not do_sample and (args.top_k is not None or args.top_p is not None):
        raise ValueError("--top-k and --top-p need a --temperature above 0: without it the likeliest token is taken")
    cache_options = {"kv_dtype": args.kv_dtype, "page_size": args.page_size, "attention_numerics": args.numerics}
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
    """Answer lines from standard input until they end, or until /quit.

    When a line fails, by Ctrl-C too, the conversation is as it was before it. Ctrl-C at the prompt ends the chat.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 then fail in their own line
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
        except Exception:  # a bug, which must not cost the conversation
            traceback.print_exc()


def read_line() -> str | None:
    """Read a line and strip it; return None at the end of the input."""
    prompt = "> " if sys.stdin and sys.stdin.isatty() else ""
    if not sys.stdout.isatty():  # where `input` would write it to
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def print_answer(session: "CliSession", question: str, sampling: dict[str, Any]) -> None:
    """Stream one answer to standard output, then print a line of statistics on standard error.

    Errors: ValueError, RuntimeError, KeyboardInterrupt; the conversation is then as it was before the question, and the
    session keeps the images for the next one.
    """
    import torch
    from transformers import TextStreamer

    from vila_triton.registry import count_calls

    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the question is not valid UTF-8 from its character {error.start + 1} on") from None
    conversation = session.conversation
    printer: Any = TextStreamer(conversation.chat_model.tokenizer, skip_special_tokens=True)
    tokens = conversation.ask(question, session.images, **sampling)
    with count_calls() as calls, closing(tokens):
        try:
            for token in tokens:
                printer.put(torch.tensor([token]))
        except BaseException:
            if printer.print_len or printer.token_cache:
                print(flush=True)  # the error stands below the part that was printed
            raise
    printer.end()
    session.images = []
    stats = conversation.last_turn
    assert stats is not None
    speed = f"{stats.tokens_per_second:.1f} tokens/s" if stats.answer_tokens > 1 else "1 token"
    seed = "" if stats.seed is None else f"seed {stats.seed} | "
    cached = stats.prompt_tokens - stats.prefill_tokens
    reused = f", {cached} cached" if cached else ""
    print(
        f"[prompt {stats.prompt_tokens} tokens{reused} | images {stats.image_tokens} tokens | "
        f"first token {stats.seconds_to_first_token:.3f} s | {speed} | "
        f"{generation_config_note(conversation, sampling)}{seed}{kernels_summary(calls)}]",
        file=sys.stderr,
    )


def generation_config_note(conversation: "Conversation", sampling: dict[str, Any]) -> str:
    """Name the sampling settings that come from the model's generation_config.json alone."""
    from vila_triton.checkpoints.generation_config import GENERATION_CONFIG_NAME, effective_settings

    settings = effective_settings(conversation.chat_model.model.generation_settings(), sampling)
    text = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{text} by {GENERATION_CONFIG_NAME} | " if settings else ""


def kernels_summary(calls: Counter[tuple[str, str]]) -> str:
    """List the implementations that ran, other than references, and the ops of --set that were never called."""
    from vila_triton.registry import OPS, explicit_choices
    from vila_triton.registry.interpreter import uses_triton_kernels

    ran = sorted(f"{op}={impl}" for op, impl in calls if impl != "reference")
    ran_triton = any(uses_triton_kernels(OPS[op].impls[impl]) for op, impl in calls)
    emulated = emulated_gpu()
    how = (
        f" (emulated, {emulated})"
        if emulated
        else " (interpreted)"
        if os.environ.get("TRITON_INTERPRET") == "1"
        else ""
    )
    ran_text = "reference" if not ran else f"{', '.join(ran)}{how if ran_triton else ''}; else reference"
    unused = sorted({*explicit_choices()} - {op for op, _ in calls})
    return f"kernels: {ran_text}" + (f"; nothing called {', '.join(unused)}" if unused else "")
