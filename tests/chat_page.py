"""The chat page in the hands of a user, and the message that a question makes."""

import base64
from pathlib import Path
from typing import Any

from chromium import KEYS, Chromium


def ask(page: Chromium, question: str) -> None:
    """Type a question and Enter."""
    page.type("#question", question + KEYS["Enter"])


def settled(page: Chromium, turns: int = 1, seconds: float = 10.0) -> None:
    """Wait until so many answers are there, with what was measured."""
    page.until(lambda: page.count("article[aria-busy=false] details:not([hidden])") == turns, seconds)


def user(text: str, *images: Path) -> dict[str, Any]:
    """The message that a question about images makes."""
    urls = [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def choose(page: Chromium, *images: Path) -> None:
    """Attach images by the file chooser."""
    before = page.count("#attached img")
    page.type("#files", "\n".join(map(str, images)))
    page.until(lambda: page.count("#attached img") == before + len(images))


def hand_over(page: Chromium, event: str, *files: tuple[str, str, int]) -> bool:
    """Paste or drop files of a name, a type and a size, or text if there are none; return True if the page takes it."""
    return not page.run(
        """const [event, files] = arguments, data = new DataTransfer();
        for (const [name, type, size] of files) data.items.add(new File([new Uint8Array(size)], name, {type}));
        if (!files.length) data.items.add("text", "text/plain");
        return document.body.dispatchEvent(event === "paste"
            ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true})
            : new DragEvent(event, {dataTransfer: data, bubbles: true, cancelable: true}));""",
        event,
        files,
    )
