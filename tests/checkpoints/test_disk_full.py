"""A full disk: one sentence says so, and nothing half-written looks whole."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from vila_triton.__main__ import main
from vila_triton.chat.conversation import Conversation
from vila_triton.chat.conversation_file import ConversationFileError, save_conversation
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.images.processing import open_image
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.quantization import awq_cache_file
from vila_triton.quantization.calibration_data import read_samples
from vila_triton.quantization.llm_awq import AwqSearchResult
from vila_triton.quantization.resumable import save_atomically
from vila_triton.tiny.examples import EXAMPLES_DIR

INT4 = BUNDLED_CHECKPOINT.with_name("checkpoint-int4")


@contextmanager
def room(size: int) -> Iterator[None]:
    """Limit the files of this process to so many bytes; writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def command(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr("sys.argv", ["vila-triton", *map(str, argv)])
    return main()


QUANTIZE = ("quantize", BUNDLED_CHECKPOINT, "--group-size", 64, "--device", "cpu")


@pytest.mark.parametrize(
    ("argv", "sizes"),
    [
        (("convert", INT4), (0, 100, 10_000, 300_000)),
        (("convert", INT4, "--format", "awq-v2"), (300_000, 1_000_000)),
        (("build", "vila1.5-3b", "--layers", 1, "--width-divisor", 8), (10_000, 300_000)),
        ((*QUANTIZE, "--method", "rtn"), (10_000, 600_000)),
        pytest.param((*QUANTIZE, "--samples", 4), (0, 10_000, 200_000, 600_000), marks=pytest.mark.slow),
        pytest.param((*QUANTIZE, "--samples", 16, "--method", "llm-awq"), (30_000, 600_000), marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(str(word) for word in value if not isinstance(word, Path)),
)
def test_full_disk_is_reported_and_the_command_resumes(
    argv: tuple, sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    name, source, *more = argv
    target, other = tmp_path / "tight" / "out", tmp_path / "wide" / "out"
    for size in sizes:
        with room(size):
            status = command(monkeypatch, name, source, target, *more)
        message = capsys.readouterr().err
        assert status == 1 and message.count("\n") == 1 and message.startswith("vila-triton: "), message
        assert not target.exists()
    assert command(monkeypatch, name, source, target, *more) == 0
    assert command(monkeypatch, name, source, other, *more) == 0
    assert contents(target) == contents(other) and [*target.parent.iterdir()] == [target]


def test_step_and_cache_files_are_written_atomically(tmp_path: Path) -> None:
    scales = {"attention": torch.ones(4096)}
    for name, write in (
        ("step.safetensors", lambda file: save_atomically(file, scales, {})),
        ("cache.pt", lambda file: awq_cache_file.save_awq_cache(file, [AwqSearchResult(scales, {}, {})])),
    ):
        for size in (0, 100, 10_000):
            with room(size), pytest.raises(OSError, match=r"cannot be written|File too large"):
                write(tmp_path / name)
            assert not (tmp_path / name).exists()
        write(tmp_path / name)
        assert (tmp_path / name).exists()


def test_conversation_is_saved_atomically(tmp_path: Path) -> None:
    conversation = Conversation(load_chat_model(BUNDLED_CHECKPOINT, "cpu"))
    list(conversation.ask("How many shapes are there?", [open_image(str(EXAMPLES_DIR / "a.png"))]))
    save_conversation(conversation, tmp_path / "talk")
    before = contents(tmp_path)
    for size in (0, 100, 1000):
        for name in ("talk", "other"):
            with room(size), pytest.raises(ConversationFileError, match=f"{name} cannot be written"):
                save_conversation(conversation, tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "entry",
    [
        {"text": "half \ud800"},
        {"image": "a.png", "question": "\udfff?"},
        {"image": "a.png", "question": "x", "answer": "\ud83d"},
    ],
)
def test_lone_surrogate_in_calibration_is_refused_by_line(entry: dict, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((EXAMPLES_DIR / "a.png").read_bytes())
    file = tmp_path / "calib.jsonl"
    file.write_text(json.dumps({"text": "a whole \U0001f600"}) + "\n" + json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=r"calib\.jsonl:2: .*the line holds half of a character"):
        list(read_samples([file]))
