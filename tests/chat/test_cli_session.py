"""Commands and failing lines of a chat, and videos, through the command line."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vila_triton.__main__ import main
from vila_triton.chat.conversation import Conversation
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.images.processing import open_image
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.examples import EXAMPLES_DIR

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


ABOUT = "[prompt "  # so begins the line about an answer


def test_save_and_resume_continue_a_conversation_and_wrong_commands_are_named(typed: Typed) -> None:
    asked = ("How many shapes are there?", "/save talk", "/save", "/new now", "/sav talk", "/sing")
    said, complaints = typed("chat", "--image", str(EXAMPLES_DIR / "a.png"), lines=asked)
    listed = "There are /image FILE, /video FILE, /new, /save FILE, /resume FILE, /quit"
    assert said == ["3"] and complaints[0].startswith(ABOUT)
    assert complaints[1:] == [
        "vila-triton: '/save': expected /save FILE",
        "vila-triton: '/new now': expected /new",
        f"vila-triton: no command '/sav'; did you mean /save? {listed}",
        f"vila-triton: no command '/sing'; {listed}",
    ]
    said, complaints = typed("chat", lines=("/resume none", "/resume talk", "Describe the picture."))
    assert "yellow triangle" in said[0] and "| images 0 tokens |" in complaints[1]
    assert complaints[0] == "vila-triton: none does not exist"


def test_video_frames_stand_between_images_in_the_order_given(typed: Typed) -> None:
    shown = [Image.open(EXAMPLES_DIR / f"{name}.png").convert("RGB") for name in "bcd"]
    shown[0].save("film.gif", save_all=True, append_images=shown[1:])
    named = ["--image", str(EXAMPLES_DIR / "a.png"), "--video", "film.gif", "--frames", "2"]
    said, (about,) = typed("ask", *named, "Describe the first image.")
    assert "yellow triangle" in said[0] and f"| images {(1 + 2) * 16} tokens |" in about
    said, (about,) = typed("chat", "--frames", "2", lines=("/video film.gif", "Describe the first image."))
    assert "purple star" in said[0] and f"| images {2 * 16} tokens |" in about


def test_frames_option_without_video_is_an_error(typed: Typed) -> None:
    assert typed("ask", "--frames", "4", "Why?")[1] == ["vila-triton: --frames 4 is of a --video, and none is given"]


FIRST, LAST = "How many shapes are there?", "Describe the picture."


@pytest.fixture(scope="module")
def untroubled() -> str:
    """The answer to LAST after FIRST about an image."""
    chat_model = load_chat_model(BUNDLED_CHECKPOINT, "cpu")
    conversation = Conversation(chat_model)
    list(conversation.ask(FIRST, [open_image(str(EXAMPLES_DIR / "a.png"))]))
    return chat_model.tokenizer.decode(list(conversation.ask(LAST)), skip_special_tokens=True)


def failing(error: BaseException, after: int) -> Callable:
    """`Conversation.ask`, but its second answer fails after so many tokens."""
    whole, asked = Conversation.ask, []

    def ask(self: Conversation, *args: Any, **how: Any) -> Iterator[int]:
        asked.append(1)
        tokens = whole(self, *args, **how)
        try:
            for i, token in enumerate(tokens):
                if len(asked) == 2 and i == after:
                    raise error
                yield token
        finally:
            tokens.close()

    return ask


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("/save /proc/none/talk", "/proc/none/talk cannot be written: "),
        (f"/save {'n' * 300}", f"{'n' * 300} cannot be written: File name too long"),
        (f"/save {'n' * 250}", f"{'n' * 250} cannot be written: "),
        ("/save .", ". exists and is not a saved conversation"),
        ("/resume damaged", "damaged is not a saved conversation"),
        (f"/resume {'n' * 300}", "File name too long"),
        ("/image none.png", "none.png does not exist"),
        (f"/image {'n' * 300}", "File name too long"),
        ("/image damaged", "damaged"),
        ("/imag a.png", "did you mean /image?"),
        ("what is \udcff?", "the question is not valid UTF-8 from its character 9 on"),
        ("", ""),
        ("   ", ""),
    ],
)
def test_wrong_line_leaves_the_conversation_unchanged(trouble: str, said: str, typed: Typed, untroubled: str) -> None:
    Path("damaged").write_bytes(b"x" * 100)
    answers, about = typed("chat", "--image", str(EXAMPLES_DIR / "a.png"), lines=(FIRST, trouble, LAST))
    assert answers == ["3", untroubled]
    assert [line for line in about if not line.startswith(ABOUT)] == about[1:-1]
    assert len(about[1:-1]) == bool(said) and said in "".join(about[1:-1])
    assert sorted(path.name for path in Path().iterdir()) == ["damaged"]


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "vila-triton: interrupted"),
        (RuntimeError("no memory is left"), "vila-triton: no memory is left"),
        (OSError(28, "No space left on device"), "vila-triton: No space left on device"),
        (ZeroDivisionError("a mistake of ours"), "ZeroDivisionError: a mistake of ours"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failed_answer_leaves_the_conversation_unchanged(
    error: BaseException, said: str, after: int, typed: Typed, untroubled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conversation, "ask", failing(error, after))
    answers, about = typed("chat", "--image", str(EXAMPLES_DIR / "a.png"), lines=(FIRST, "What is at the top?", LAST))
    assert (answers[0], answers[-1]) == ("3", untroubled) and about[-2] == said
    assert len(answers) == 2 + (after > 0)  # what was said of it stands in a line of its own


def test_images_of_a_failed_question_are_kept_for_the_next(typed: Typed, monkeypatch) -> None:
    monkeypatch.setattr(Conversation, "ask", failing(RuntimeError("no memory is left"), 0))
    shown = (FIRST, "/new", f"/image {EXAMPLES_DIR / 'a.png'}", FIRST, FIRST)
    answers, about = typed("chat", "--image", str(EXAMPLES_DIR / "b.png"), lines=shown)
    assert answers == ["4", "3"] and about[1] == "vila-triton: no memory is left"


def test_ctrl_c_at_the_prompt_ends_the_chat(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("vila_triton.commands.chat.read_line", lambda: interrupted(""))
    assert typed("chat") == ([], ["vila-triton: interrupted"])


def test_invalid_utf8_fails_in_its_own_line_alone(
    untroubled: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = f"{FIRST}\n".encode() + b"what is \xff\xfe?\n" + f"{LAST}\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    monkeypatch.setattr("sys.argv", ["vila-triton", "chat", "--image", str(EXAMPLES_DIR / "a.png"), "--device", "cpu"])
    assert main() == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["3", untroubled] and "not valid UTF-8 from its character 9 on" in err
