"""Questions with images for a model: a sample of the bundled generator's held-out questions, or those of a file."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vila_triton.files.reading import LoadError, parse_json
from vila_triton.images.processing import open_image
from vila_triton.tiny.evaluate import build_questions


@dataclass(frozen=True)
class Prompt:
    """A question and its images."""

    question: str
    images: Sequence[Image.Image]


def bundled_prompts(count: int, seed: int) -> list[Prompt]:
    """Returns questions of different kinds about held-out scenes. Errors: ValueError for more than there are kinds."""
    candidates = build_questions(1, seed)
    if not 1 <= count <= len(candidates):
        raise ValueError(f"{count} bundled questions, expected 1 to {len(candidates)}")
    return [Prompt(item.qa.question, item.images) for item in random.Random(seed).sample(candidates, count)]


def read_prompts(file: Path) -> list[Prompt]:
    """Reads one JSON object per line, {"question": "...", "images": ["FILE", ...]}, files relative to this one.

    Errors: ValueError naming the line, OSError.
    """
    prompts = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            record = parse_json(text, file)
            question, images = record["question"], record.get("images", [])
            image_files = [file.parent / name for name in images]
            if not isinstance(question, str):
                raise TypeError
        except (LoadError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{file}:{number}: expected {{"question": "...", "images": ["FILE"]}}') from None
        prompts.append(Prompt(question, [open_image(image_file) for image_file in image_files]))
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts
