"""A chat's lines that are no questions, and videos, through the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vila_triton.__main__ import main
from vila_triton.tiny.examples import FOLDER

Typed = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Typed:
    """Run a command in a folder of its own, type lines into it, and hear what it says and complains of."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str, lines: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
        left = iter(lines)
        monkeypatch.setattr("builtins.input", lambda _: next(left, "/quit"))
        monkeypatch.setattr("sys.argv", ["vila-triton", *args, "--device", "cpu"])
        main()
        return tuple(text.splitlines() for text in capsys.readouterr())  # pyright: ignore[reportReturnType]

    return run


def test_a_chat_is_saved_and_another_goes_on_with_it(typed: Typed) -> None:
    asked = ("How many shapes are there?", "/save talk", "/save", "/sing")
    said, complaints = typed("chat", "--image", str(FOLDER / "a.png"), lines=asked)
    listed = "there are /image PICTURE, /video FILE, /new, /save FILE, /resume FILE and /quit"
    assert said[0] == "3"
    assert complaints == [f"vila-triton: no command '{line}'; {listed}" for line in asked[2:]]
    said, complaints = typed("chat", lines=("/resume none", "/resume talk", "Describe the picture."))
    assert "yellow triangle" in said[0] and "| pictures 0 tokens |" in said[1]
    assert complaints == ["vila-triton: none does not exist"]


def test_a_video_is_shown_in_frames_between_the_pictures_where_it_is_named(typed: Typed) -> None:
    shown = [Image.open(FOLDER / f"{name}.png").convert("RGB") for name in "bcd"]
    shown[0].save("film.gif", save_all=True, append_images=shown[1:])
    named = ["--image", str(FOLDER / "a.png"), "--video", "film.gif", "--frames", "2"]
    said, _ = typed("ask", *named, "Describe the first image.")
    assert "yellow triangle" in said[0] and f"| pictures {(1 + 2) * 16} tokens |" in said[1]
    said, _ = typed("chat", "--frames", "2", lines=("/video film.gif", "Describe the first image."))
    assert "purple star" in said[0] and f"| pictures {2 * 16} tokens |" in said[1]


def test_frames_without_a_video_are_a_mistake(typed: Typed) -> None:
    assert typed("ask", "--frames", "4", "Why?")[1] == ["vila-triton: --frames 4 is of a --video, and none is given"]
