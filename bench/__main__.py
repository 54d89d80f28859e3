"""Lists the commands of bench, grouped by the question that they answer: `python -m bench`"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from ._tool import tool

COMMANDS = {
    "Is a kernel right?": ("check", "compiled_check", "correctness", "accuracy", "shadow"),
    "Would the checks and tests see it if it were not?": ("mutants", "ptx_mutants"),
    "What did the compiler make of it?": ("inspect", "compiled", "compile_sweep", "recompiles", "emulate"),
    "How fast is it?": ("ops", "predict", "goals", "tune", "choices", "peers"),
    "How fast is a model, and how much memory does it take?": (
        "model",
        "training",
        "serve",
        "decode_budget",
        "roofline",
        "kv_dtypes",
        "prefill_memory",
        "load_memory",
    ),
    "What does quantization cost?": ("quality", "quantize_memory"),
    "What was measured, all together?": ("suite", "plot", "report"),
    "What would a GPU do?": ("standin",),
}


def summary(name: str) -> str:
    """Returns the first sentence of a command's docstring; nothing is imported."""
    path = Path(__file__).parent / name
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(source.read_text())) or ""
    return " ".join(doc.split("`python -m")[0].split("\n\n")[0].split()).rstrip(":")


def listing() -> Iterator[str]:
    """Yields the lines that `python -m bench` prints."""
    for question, names in COMMANDS.items():
        yield from ("", question)
        yield from (f"  bench.{name:16}{summary(name)}" for name in names)


@tool
def main() -> None:
    print("Usage: python -m bench.COMMAND [OPTIONS]; --help explains each command.", *listing(), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
