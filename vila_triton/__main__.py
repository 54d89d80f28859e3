"""The command line: `vila-triton ask | chat | ops`."""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ranges import names

if TYPE_CHECKING:
    import torch

    from .chat import Conversation
    from .ranges import Choice

BUNDLED = Path(__file__).resolve().parent / "tiny" / "checkpoint"
KV_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
POLICIES = ("fast", "invariant")
DTYPES = ("float16", "bfloat16", "float32")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="vila-triton", description="Ask a VILA about pictures.")
    commands = top.add_subparsers(dest="command", required=True)
    kernels = argparse.ArgumentParser(add_help=False)
    kernels.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    kernels.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="kernels.OP=NAME",
        help="run this implementation of an op; kernels.*=NAME for every op that has one of that name",
    )
    model = argparse.ArgumentParser(add_help=False, parents=[kernels])
    model.add_argument("--model", type=Path, default=BUNDLED, help="a VILA folder (default: the bundled tiny model)")
    for kind in ("image", "video"):  # in the order given
        model.add_argument(
            f"--{kind}",
            action="append",
            default=[],
            dest="seen",
            type=lambda path, kind=kind: (kind, path),
            metavar="FILE",
            help="may be given several times",
        )
    model.add_argument("--frames", type=int, help="of each video (default: the model's num_video_frames, else 8)")
    model.add_argument("--dtype", choices=DTYPES, help="(default: what the model's config says)")
    model.add_argument("--kv-dtype", choices=KV_DTYPES, help="of the cache (default: the model's)")
    model.add_argument("--page-size", type=int, default=16, help="tokens in a page of the cache: 16 to 256")
    model.add_argument("--policy", choices=POLICIES, default="fast", help="of attention; invariant: no bit by chance")
    model.add_argument("--max-new-tokens", type=int, default=128)
    model.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    model.add_argument("--top-k", type=int)
    model.add_argument("--top-p", type=float)
    model.add_argument("--seed", type=int, default=0)
    ask = commands.add_parser("ask", parents=[model], help="one question about pictures")
    ask.add_argument("question")
    commands.add_parser(
        "chat", parents=[model], help="a conversation; in it: /image, /video, /new, /save, /resume, /quit"
    )
    commands.add_parser("ops", parents=[kernels], help="every op, its implementations and which one is chosen, and why")
    return top


def choices(settings: list[str]) -> dict[str, str]:
    """`kernels.OP=NAME` settings as {op: name}. Errors: ValueError, KeyError."""
    from .registry import OPS, discover

    chosen: dict[str, str] = {}
    if settings:
        discover()
    for setting in settings:
        key, _, name = setting.partition("=")
        op = key.removeprefix("kernels.")
        if op == key or not name:
            raise ValueError(f"--set {setting}: expected kernels.OP=NAME")
        chosen |= {o: name for o, entry in OPS.items() if name in entry.impls} if op == "*" else {op: name}
        if op == "*" and name not in chosen.values():
            raise ValueError(f"--set {setting}: no op has an implementation {name!r}")
    return chosen


def converse(args: argparse.Namespace, chosen: Mapping[str, str]) -> None:
    import torch

    from .chat import Conversation, Talker
    from .registry import use
    from .session import Session, frames_of, pictures

    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature is {args.temperature}, expected a number from 0 up")
    if not args.temperature and (args.top_k is not None or args.top_p is not None):
        raise ValueError("--top-k and --top-p need a --temperature above 0: without it the likeliest token is taken")
    sampling: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "top_k": args.top_k, "top_p": args.top_p}
    if args.temperature > 0:
        sampling |= {"do_sample": True, "temperature": args.temperature, "seed": args.seed}
    if args.command == "ask" and args.frames is not None and not any(kind == "video" for kind, _ in args.seen):
        raise ValueError(f"--frames {args.frames} is of a --video, and none is given")
    frames = frames_of(args.model) if args.frames is None else args.frames
    seen = pictures(args.seen, frames)
    talker = Talker.from_pretrained(args.model, args.device, getattr(torch, args.dtype) if args.dtype else None)
    config = talker.model.config
    config.kv_dtype, config.page_size, config.attention_policy = args.kv_dtype, args.page_size, args.policy
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

    from .registry import recording

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
        f"first token {took.first_token:.3f} s | {speed} | {kernels_line(calls)}]"
    )


def kernels_line(calls: Counter[tuple[str, str]]) -> str:
    """Which implementations ran, the reference ones in one word."""
    ran = sorted(f"{op}={impl}" for op, impl in calls if impl != "reference")
    interpreted = " (interpreted)" if os.environ.get("TRITON_INTERPRET") == "1" and ran else ""
    rest = "reference" if not ran else f"{', '.join(ran)}{interpreted}; else reference"
    return f"kernels: {rest}"


def print_ops(device: "torch.device", chosen: Mapping[str, str]) -> None:
    from .choices import PHASES
    from .registry import OPS, checked, discover, use
    from .tuned import kernels_for

    discover()
    checked(chosen)
    with use(**chosen):
        choices = {phase: {**kernels_for(device, phase), **chosen} for phase in PHASES}
    root = Path(__file__).resolve().parents[1]
    lines = []
    for name, op in OPS.items():
        phases = {phase: choices[phase].get(name, "reference") for phase in PHASES}
        for impl in op.impls.values():
            when: dict[str, list[str]] = {}  # the sizes it runs at -> in which phases
            for phase, choice in phases.items():
                if impl.name in names(choice):
                    when.setdefault(sizes(choice, impl.name, op.varying), []).append(phase)
            why = "; ".join(" and ".join(of) + (at and f", {at}") for at, of in when.items()) or "-"
            file = impl.file.relative_to(root) if impl.file.is_relative_to(root) else impl.file
            lines.append((name, impl.name, str(len(impl.configs)), why, str(file)))
        lines.append(("", f"because: {'--set' if name in chosen else reason(device, name)}"))
    head = ("op", "implementation", "configs", f"chosen on {device.type} for", "file")
    widths = [max(len(line[i]) for line in [head, *lines] if len(line) > 2) + 2 for i in range(4)]
    for line in [head, *lines]:
        print("".join(f"{word:{width}}" for word, width in zip(line, widths)) + "".join(line[4:]))


def sizes(choice: "Choice", name: str, varying: tuple[str, ...]) -> str:
    """At which sizes a choice is this implementation, in words; nothing if at all."""
    return "" if isinstance(choice, str) else choice.where(name, varying[0])


def reason(device: "torch.device", op: str) -> str:
    from .choices import PHASES, configured
    from .tuned import choice_of, file_of, folder, name_of, table_of

    name = name_of(device)
    if name and op in table_of(name)["choices"] and choice_of(op, name):
        return f"configs/tuned/{file_of(name, folder()).name} chooses for this GPU"
    named = any(op in configured(device.type, phase) for phase in PHASES)
    return f"configs/kernels.toml names {'it' if named else 'none'} for {device.type}"


def main() -> int:
    args = parser().parse_args()
    from .choices import pick_device

    try:
        device = pick_device(args.device)
        if device.type == "cpu" and args.set:
            # Must be set before triton is first imported; the line under an answer says that kernels ran interpreted.
            os.environ.setdefault("TRITON_INTERPRET", "1")
        chosen = choices(args.set)
        if args.command == "ops":
            print_ops(device, chosen)
        else:
            converse(args, chosen)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        print(f"vila-triton: {error.args[0] if error.args else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
