"""What a model is shown before its weights are rounded: prompts with pictures, as in inference, and plain text."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vila_triton.chat.prompts import closing, first_round, with_pictures
from vila_triton.chat.templates import template
from vila_triton.files.reading import parse_json, require_file, shown
from vila_triton.images.processing import open_image, pixels
from vila_triton.models.vila import splice

LONGEST = 512  # tokens of a row of text


@dataclass(frozen=True)
class Sample:
    """A text, or with pictures a question about them and its answer."""

    text: str
    pictures: Sequence[Image.Image | Path] = ()
    answer: str = ""


@dataclass(frozen=True)
class Prompts:
    """Spliced rows [t] each, and the pictures that their negative numbers point into, [n, c, H, W] or None."""

    rows: list[Tensor]
    pixels: Tensor | None


def read(files: Sequence[Path]) -> Iterator[Sample]:
    """Samples of files: one text a line, or where a line is a JSON object {"text": ...} or {"image": a path or several,
    "question": ..., "answer": ...}; paths count from the file's folder. No picture is opened yet.

    Errors: ValueError naming file and line.
    """
    for file in files:
        require_file(file)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not text in UTF-8 ({error.reason} at byte {error.start})") from None
        of = entry if file.suffix.lower() in (".json", ".jsonl") else lambda line, _: Sample(line)
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield of(line, file.parent)
                except ValueError as error:
                    raise ValueError(f"{file}:{number}: {error}") from None


def entry(line: str, folder: Path) -> Sample:
    """A line of JSON. Errors: ValueError."""
    expected = 'expected {"text": ...} or {"image": ..., "question": ..., "answer": ...}'
    held = parse_json(line, f"{expected}; the line")
    names = set(held) if isinstance(held, dict) else set()
    if names != {"text"} and not {"image", "question"} <= names <= {"image", "question", "answer"}:
        raise ValueError(f"{expected} (has {', '.join(sorted(names)) or type(held).__name__})")
    images = held.get("image", [])
    images = images if isinstance(images, list) else [images]
    words = [held[name] for name in sorted(names - {"image"})]
    if not all(isinstance(x, str) for x in words + images) or ("image" in names and not images):
        raise ValueError(f"{expected}, all of them strings, or for images a list of some")
    paths = [folder / image for image in images]
    for path in paths:
        if not isfile(path):  # false as well for what cannot be a name
            raise ValueError(f"{shown(str(path))[1:-1]} does not exist, or is no file")
    if not paths:
        return Sample(held["text"])
    with_pictures(held["question"], len(paths))  # it has a place for each
    return Sample(held["question"], paths, held.get("answer", ""))


def drawn(count: int, seed: int) -> list[Sample]:
    """Pictures that the bundled model's generator draws, with questions and answers; none of its held-out scenes."""
    from vila_triton.tiny.questions import ask
    from vila_triton.tiny.scenes import draw, sample

    rng, found = random.Random(seed), []
    for i in range(count):
        scenes = [sample(rng) for _ in range(1 + i % 2)]
        qa = ask(rng, scenes)
        found.append(Sample(qa.question, [draw(scene, rng) for scene in scenes], qa.answer))
    return found


def manual(count: int, seed: int) -> list[Sample]:
    """English that Python ships: pages of its manual (`pydoc_data.topics`)."""
    from pydoc_data.topics import topics

    pages = [page for _, page in sorted(topics.items()) if len(page) > 1500]
    random.Random(seed).shuffle(pages)
    return [Sample(page) for page in pages[:count]]


def choose(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """At most `count` of them, in an order that the seed decides. Errors: ValueError if there are none."""
    if not samples:
        raise ValueError("calibration has no samples: its files are empty")
    order = list(samples)
    random.Random(seed).shuffle(order)
    return order[:count]


def prompts(samples: Sequence[Sample], tokenizer: Any, processor: Any, config: Any, image_tokens: int) -> Prompts:
    """Rows of token ids as the model would see them in a conversation; plain text without one, its first `LONGEST`.

    config: the model's, of which `conversation_template` and `image_aspect_ratio` are read.
    """
    words = template(getattr(config, "conversation_template", None), tokenizer)
    rows, pictures = list[Tensor](), list[Image.Image]()
    for sample in samples:
        if sample.pictures:
            ids = first_round(with_pictures(sample.text, len(sample.pictures)), words, tokenizer)
            ids += [
                *tokenizer(sample.answer, add_special_tokens=False).input_ids,
                *closing(words, tokenizer, last=True),
            ]
            pictures += [open_image(str(one)) if isinstance(one, Path) else one for one in sample.pictures]
        else:
            ids = tokenizer(sample.text).input_ids[:LONGEST]
        rows.append(torch.tensor(ids))
    counts = [image_tokens] * len(pictures)
    spliced = splice(rows, counts, len(tokenizer))
    shown = pixels(pictures, processor, getattr(config, "image_aspect_ratio", None)) if pictures else None
    return Prompts(spliced, shown)


def weights(rows: Sequence[Tensor], image_weight: float) -> Tensor:
    """How much each token counts, of mean 1: a picture's `image_weight` for each 1 of a word; [s]."""
    if not 0 <= image_weight < float("inf"):
        raise ValueError(f"image weight is {image_weight}, expected a number from 0 up")
    seen = torch.cat(list(rows)) < 0
    if image_weight != 1 and not seen.any():
        raise ValueError(f"image weight is {image_weight}, but calibration has no pictures")
    w = torch.where(seen, image_weight, 1.0)
    if not w.sum():
        raise ValueError("with an image weight of 0, calibration needs words too")
    return w / w.mean()
