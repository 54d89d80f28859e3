"""The documents, their fenced blocks, and the comparison of printed output with the output that a document shows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "vila_triton/README.md",
        "vila_triton/quantization/README.md",
        "kernels/README.md",
        "kernels/USE.md",
        "bench/README.md",
        "bench/emulator/README.md",
        "configs/README.md",
        "vila_triton/vllm_plugin/README.md",
    )
]
FENCE = re.compile(r"(?:^<!-- (?P<lane>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?", re.I)  # not those within names, such as sm_90
UNITS = {"s": r"[num]?s", "B": r"[kKMG]?i?B"}


@dataclass(frozen=True)
class Block:
    """A fenced block. The comment on the line before it is its `lane`, the place where it is run, "" being the default
    suite; ", with OPTIONS" behind that are `options` to append to each of its commands there.
    """

    document: Path
    line: int
    language: str
    lane: str
    options: str
    body: str

    def commands(self) -> Iterator[tuple[str, str]]:
        """(command, output shown) of a console block; all of a bash block as one command, with the output ""."""
        if self.language == "bash":
            yield self.body, ""
            return
        for part in re.split(r"^\$ ", self.body, flags=re.M)[1:]:
            first = re.match(r"(?:.*\\\n)*.*\n?", part)  # a backslash at the end of a line goes on with the next
            assert first
            yield first.group(), part[first.end() :]


def name(path: Path) -> str:
    """The path within the repository."""
    return str(path.relative_to(ROOT))


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, in their order."""
    text, result = document.read_text(), []
    for m in FENCE.finditer(text):
        lane, _, options = (m["lane"] or "").partition(", with ")
        result.append(Block(document, text.count("\n", 0, m.start("body")), m["language"], lane, options, m["body"]))
    return result


def without_numbers(text: str) -> str:
    """The text with every number as 0, every unit of time as s and of memory as B, and single blanks."""
    text = re.sub(r"(?<!\S)-(?!\S)", "0", NUMBER.sub("0", text))  # an empty cell of a table
    for unit, spelled in UNITS.items():
        text = re.sub(rf"0 {spelled}\b", f"0 {unit}", text)
    return "".join(" ".join(line.split()) + "\n" for line in text.strip().splitlines())


def is_shown(shown: str, printed: str) -> bool:
    """True if `printed` is what a document shows, numbers aside. In it "..." alone on a line stands for any number of
    lines, and within a line for any text.
    """
    lines = []
    for line in without_numbers(shown).splitlines():
        lines.append(r"(?:.*\n)*?" if line == "..." else r".*".join(map(re.escape, line.split("..."))) + r"\n")
    return re.fullmatch("".join(lines), without_numbers(printed)) is not None
