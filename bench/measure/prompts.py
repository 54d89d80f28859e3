"""Prompts with pictures to run a model on: a sample of the bundled generator's held-out questions, or a file's."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vila_triton.files.reading import LoadError, parse_json
from vila_triton.images.processing import open_image
from vila_triton.tiny.evaluate import items


@dataclass(frozen=True)
class Prompt:
    question: str
    pictures: Sequence[Image.Image]


def bundled(count: int, seed: int) -> list[Prompt]:
    """Questions of different kinds about held-out scenes. Errors: ValueError for more than there are kinds."""
    there = items(1, seed)
    if not 1 <= count <= len(there):
        raise ValueError(f"{count} bundled questions, expected 1 to {len(there)}")
    return [Prompt(item.qa.question, item.pictures) for item in random.Random(seed).sample(there, count)]


def read(file: Path) -> list[Prompt]:
    """One JSON object a line: {"question": "...", "images": ["FILE", ...]}, files relative to this one.

    Errors: ValueError naming the line, OSError.
    """
    found = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            held = parse_json(text, file)
            question, images = held["question"], held.get("images", [])
            pictures = [file.parent / name for name in images]
            if not isinstance(question, str):
                raise TypeError
        except (LoadError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{file}:{number}: expected {{"question": "...", "images": ["FILE"]}}') from None
        found.append(Prompt(question, [open_image(picture) for picture in pictures]))
    if not found:
        raise ValueError(f"{file} holds no prompt")
    return found
