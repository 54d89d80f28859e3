"""Links, files, modules, commands and options that the documents name exist."""

import re
from itertools import chain
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, name

from vila_triton.__main__ import build_parser

FOLDERS = ("vila_triton", "bench", "tests")
SOURCES = "".join(path.read_text() for path in chain.from_iterable((ROOT / f).rglob("*.py") for f in FOLDERS))
COMMANDS = next(action for action in build_parser()._actions if action.dest == "command").choices or ()
FOREIGN = (  # options of pip, pytest and vLLM
    *("--no-deps", "--dist", "--api-key", "--allowed-media-domains", "--allowed-local-media-path"),
    *("--tensor-parallel-size", "--max-num-seqs"),
)


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)


def code(document: Path) -> list[str]:
    """Return the texts between backticks in the prose of a document."""
    return re.findall(r"`([^`\n]+)`", prose(document))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r'\]\(([^)\s]+)\)|<img src="([^"]+)"', prose(document))
    for link in (a or b for a, b in links):
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_exist(document: Path) -> None:
    folders = (ROOT, document.parent, ROOT / "vila_triton", ROOT / "vila_triton/tiny/checkpoint")
    written = r"[a-z_][\w.*-]*/(?:[\w.*/-]*\.(?:py|toml|md|jsonl|svg|json))?"
    named = [text for text in code(document) if re.fullmatch(written, text) and not re.search("[A-Z]{2}", text)]
    assert not [text for text in named if not any(any(folder.glob(text.rstrip("/"))) for folder in folders)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_modules_commands_and_options_exist(document: Path) -> None:
    for text in code(document):
        for module in re.findall(r"(?:python -m |^)((?:bench|tests|vila_triton)(?:\.[a-z_]\w*)+)", text):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").exists(), text
        for command in re.findall(r"vila-triton ([a-z]+)", text):
            assert command in COMMANDS, text
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", text):
            assert f'"{option}"' in SOURCES or option in FOREIGN, text


def test_every_command_is_documented() -> None:
    text = "".join(document.read_text() for document in DOCUMENTS)
    files = (ROOT / "bench").glob("[a-z]*.py")  # without __main__
    tools = [path.stem for path in files if '__name__ == "__main__"' in path.read_text()]
    packages = [path.parent.name for path in (ROOT / "bench").glob("*/__main__.py")]
    assert not [tool for tool in tools + packages if f"bench.{tool}" not in text]
    assert not [command for command in COMMANDS if f"vila-triton {command}" not in text]


def test_the_first_document_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
