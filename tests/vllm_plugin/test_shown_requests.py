"""The server, the requests and the clients that documents show in the lane `vllm` are run, and answer as shown."""

import contextlib
import io
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, Block, blocks, is_shown, name

pytestmark = pytest.mark.vllm
LANE = "vllm"
SHOWING = [document for document in DOCUMENTS if any(block.lane == LANE for block in blocks(document))]


@contextlib.contextmanager
def serving(command: str, port: int) -> Iterator[str]:
    """Run a command `vila-triton serve ...` at another port than it says, and yield the line with its address."""
    words = command.partition("#")[0].split()[1:]
    arguments = [sys.executable, "-m", "vila_triton", *words, "--port", str(port)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield next((line for line in process.stdout if line.startswith("http")), "")
    finally:
        process.terminate()
        process.wait(60)


def printed_by(block: Block, port: int, namespace: dict[str, object]) -> str:
    """The output of a block that asks the server."""
    body = block.body.replace(":8000", f":{port}")
    if block.language == "bash":
        answer = subprocess.run(["bash", "-ec", body], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return json.loads(answer)["choices"][0]["message"]["content"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(body, name(block.document), "exec"), namespace)
    return printed.getvalue()


@pytest.mark.parametrize("document", SHOWING, ids=name)
def test_requests_that_a_document_shows_are_answered(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server, *asking = [block for block in blocks(document) if block.lane == LANE]
    ((command, shown),) = server.commands()
    namespace: dict[str, object] = {"question": {"type": "text", "text": "How many blue shapes are there?"}}
    with serving(command, port) as address:
        assert is_shown(shown.splitlines()[-1], address)
        for block in asking:
            answer = printed_by(block, port, namespace)
            expected = re.findall(r"print\(.*\)  # (.*)$", block.body, re.M) or (["2"] if "blue" in block.body else [])
            assert answer.strip() == expected[0] if expected else answer.strip()
