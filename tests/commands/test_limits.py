"""No command takes a number and makes something else of it: every numeric option of every command is tried."""

import argparse
import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from vila_triton import __main__ as commands
from vila_triton.engine.sampling import SamplingParams, check_sampling_arguments
from vila_triton.hf.generation import check_generate_arguments
from vila_triton.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
WRONG = ("0", "-1", "nan", "inf", "-inf", "1e999", "1" + "0" * 30, "", "1,0", "one")
ALLOWED = {  # option -> the values above that it takes
    "--seed": {"0"},
    "--temperature": {"0"},  # the likeliest token
    "--image-weight": {"0"},  # only words count
    "--config": {"0"},  # the first
    "--tokens": {"0"},  # prefill alone (bench.shadow)
    "--count": {"0"},  # bytes alone (bench.kv_dtypes)
    "--chunks": {"0"},  # one pass
    "--check-seconds": {"0"},  # without check (bench.mutants)
    "--test-seconds": {"0"},  # without tests (bench.mutants)
    "--images": {"0"},
    "--trace-seed": {"0"},
    "--right": {"0"},  # any answers do (bench.serve)
    "--port": {"0"},  # any free one
    "--pictures": {"0"},
    "--frozen-fraction": {"0"},
    "--old-fraction": {"0"},
    "--frozen": {"0"},
    "--tower-lr-factor": {"0"},
    "--tower-factor": {"0"},
    **{option: {""} for option in ("--prompts", "--histories", "--batches", "--contexts")},  # none (bench.model)
    **{option: {""} for option in ("--streams", "--rates")},  # none (bench.serve)
}


class Parsed(BaseException):
    """Raised in place of parsing: a command is not to go on."""


def mains() -> Iterator[str]:
    """The modules that are commands: all with a parser in their `main`, or one that it calls."""
    for folder in ("bench", "vila_triton"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
            if "main" in defined and "ArgumentParser(" in text:
                yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    yield from (leaf for a in inner for child in a.choices.values() for leaf in leaves(child)) if inner else [parser]


def numeric(action: argparse.Action) -> bool:
    try:
        read = action.type("1") if callable(action.type) else None
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return isinstance(action.type, Limits)
    return isinstance(read, int | float | list)


def refusal(parser: argparse.ArgumentParser, action: argparse.Action, text: str) -> str | None:
    """The error for a value of an option, or for one of several values; None if it is accepted."""
    try:
        parser._check_value(action, parser._get_value(action, text))
    except argparse.ArgumentError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {p.prog: p for p in leaves(commands.build_parser())}

    def parse(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise Parsed(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr("sys.argv", ["command"])
        for name in mains():
            if name != "vila_triton.__main__":
                with pytest.raises(Parsed) as caught:
                    import_module(name).main()
                found[name] = caught.value.args[0]
    return found


def test_parsers_of_all_commands_are_found(parsers: dict[str, argparse.ArgumentParser]) -> None:
    assert {"vila-triton ask", "vila-triton quantize", "bench.tune", "bench.peers.__main__"} <= parsers.keys()
    assert sum(numeric(action) for parser in parsers.values() for action in parser._actions) > 50


def test_invalid_numbers_are_refused_naming_the_option(parsers: dict[str, argparse.ArgumentParser]) -> None:
    wrong = []
    for name, parser in parsers.items():
        for action in filter(numeric, parser._actions):
            option = action.option_strings[0]
            for text in WRONG:
                said = refusal(parser, action, text)
                if text in ALLOWED.get(option, ()):
                    continue
                if said is None or option not in said:
                    wrong.append(f"{name} {option} {text!r}: {said or 'is taken'}")
    assert not wrong


def test_numeric_options_have_limits_or_choices(parsers: dict[str, argparse.ArgumentParser]) -> None:
    """Not by chance: an int or a float alone knows no limits."""
    bare = [
        f"{name} {action.option_strings}"
        for name, parser in parsers.items()
        for action in parser._actions
        if action.type in (int, float) and not action.choices
    ]
    assert not bare


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed"])
@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), 10**30, "1", True, [1.5]], ids=str)
def test_sampling_arguments_have_the_same_limits_everywhere(name: str, wrong: Any) -> None:
    how = {"do_sample": True, name: wrong}
    for refused in (
        lambda: SamplingParams.from_generate_kwargs(1, **how),
        lambda: check_generate_arguments("engine", how),
        lambda: check_generate_arguments("transformers", how) if name != "seed" else check_sampling_arguments(how),
    ):
        with pytest.raises(ValueError, match=rf"^{name} is "):
            refused()


def test_numbers_within_limits_are_accepted() -> None:
    half = Limits(float, 0, 1, exclude_minimum=True)
    assert half("1e-3") == 0.001 and half.validate("x", 1) == 1.0 and isinstance(half.validate("x", 1), float)
    assert str(half) == "a number above 0 and at most 1"
    with pytest.raises(argparse.ArgumentTypeError, match="'0' is given, expected a number above 0 and at most 1"):
        half("0")
    assert SamplingParams.from_generate_kwargs(2, do_sample=True, temperature=2, top_p=1, seed=[5, 7]).seeds == [5, 7]
