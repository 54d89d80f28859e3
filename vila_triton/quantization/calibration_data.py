"""The calibration set: prompts with images, as in inference, and plain text."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vila_triton.chat.prompts import end_of_turn_ids, first_turn_ids, insert_image_tokens
from vila_triton.chat.templates import resolve_template
from vila_triton.files.reading import parse_json, require_file, short_repr
from vila_triton.images.processing import open_image, preprocess_images
from vila_triton.models.vila import splice_image_tokens

MAX_TEXT_TOKENS = 512  # tokens of a plain text that are kept


@dataclass(frozen=True)
class Sample:
    """A text; or a question about images, with its answer."""

    text: str
    images: Sequence[Image.Image | Path] = ()
    answer: str = ""


@dataclass(frozen=True)
class CalibrationSet:
    """Sequences of spliced ids [t] each, and the images [n, c, H, W] that they refer to, or None."""

    sequences: list[Tensor]
    pixel_values: Tensor | None


def read_samples(files: Sequence[Path]) -> Iterator[Sample]:
    """Read samples from files: one text a line; or JSON objects, one a line, in .json and .jsonl files.

    An object is {"text": ...}, or {"image": a path or several, "question": ..., "answer": ...}, with paths relative to
    the file's folder. Images are not opened yet. Errors: ValueError naming file and line.
    """
    for file in files:
        require_file(file)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not text in UTF-8 ({error.reason} at byte {error.start})") from None
        parse = parse_json_sample if file.suffix.lower() in (".json", ".jsonl") else lambda line, _: Sample(line)
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield parse(line, file.parent)
                except ValueError as error:
                    raise ValueError(f"{file}:{number}: {error}") from None


def parse_json_sample(line: str, folder: Path) -> Sample:
    """Parse a line of JSON. Errors: ValueError."""
    expected = 'expected {"text": ...} or {"image": ..., "question": ..., "answer": ...}'
    value = parse_json(line, f"{expected}; the line")
    keys = set(value) if isinstance(value, dict) else set()
    if keys != {"text"} and not {"image", "question"} <= keys <= {"image", "question", "answer"}:
        raise ValueError(f"{expected} (has {', '.join(sorted(keys)) or type(value).__name__})")
    images = value.get("image", [])
    images = images if isinstance(images, list) else [images]
    texts = [value[name] for name in sorted(keys - {"image"})]
    if not all(isinstance(x, str) for x in texts + images) or ("image" in keys and not images):
        raise ValueError(f"{expected}, all of them strings, or for images a list of strings")
    paths = [folder / image for image in images]
    for path in paths:
        if not isfile(path):  # false as well for what cannot be a name
            raise ValueError(f"{short_repr(str(path))[1:-1]} does not exist, or is no file")
    if not paths:
        return Sample(value["text"])
    insert_image_tokens(value["question"], len(paths))  # raises unless it has an image token for each
    return Sample(value["question"], paths, value.get("answer", ""))


def synthetic_samples(count: int, seed: int) -> list[Sample]:
    """Images that the bundled model's generator draws, with questions and answers; none of its held-out scenes."""
    from vila_triton.tiny.questions import random_question
    from vila_triton.tiny.scenes import draw_scene, random_scene

    rng, samples = random.Random(seed), []
    for i in range(count):
        scenes = [random_scene(rng) for _ in range(1 + i % 2)]
        qa = random_question(rng, scenes)
        samples.append(Sample(qa.question, [draw_scene(scene, rng) for scene in scenes], qa.answer))
    return samples


def python_manual_samples(count: int, seed: int) -> list[Sample]:
    """English text that comes with Python: pages of its manual (`pydoc_data.topics`)."""
    from pydoc_data.topics import topics

    pages = [page for _, page in sorted(topics.items()) if len(page) > 1500]
    random.Random(seed).shuffle(pages)
    return [Sample(page) for page in pages[:count]]


def sample_subset(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """At most `count` of the samples, in an order that the seed decides. Errors: ValueError if there are none."""
    if not samples:
        raise ValueError("calibration has no samples: its files are empty")
    shuffled = list(samples)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def build_calibration_set(
    samples: Sequence[Sample], tokenizer: Any, processor: Any, config: Any, image_tokens: int
) -> CalibrationSet:
    """Tokenize samples and preprocess their images.

    A sample with images becomes the first turn of a conversation; plain text stays as it is, its first MAX_TEXT_TOKENS
    tokens. config: the model's, whose `conversation_template` and `image_aspect_ratio` are read.
    """
    chat_template = resolve_template(getattr(config, "conversation_template", None), tokenizer)
    sequences, images = list[Tensor](), list[Image.Image]()
    for sample in samples:
        if sample.images:
            ids = first_turn_ids(insert_image_tokens(sample.text, len(sample.images)), chat_template, tokenizer)
            ids += [
                *tokenizer(sample.answer, add_special_tokens=False).input_ids,
                *end_of_turn_ids(chat_template, tokenizer, end_conversation=True),
            ]
            images += [open_image(str(image)) if isinstance(image, Path) else image for image in sample.images]
        else:
            ids = tokenizer(sample.text).input_ids[:MAX_TEXT_TOKENS]
        sequences.append(torch.tensor(ids))
    counts = [image_tokens] * len(images)
    spliced = splice_image_tokens(sequences, counts, len(tokenizer))
    pixel_values = preprocess_images(images, processor, getattr(config, "image_aspect_ratio", None)) if images else None
    return CalibrationSet(spliced, pixel_values)


def token_weights(sequences: Sequence[Tensor], image_weight: float) -> Tensor:
    """Weigh the tokens, [s] of mean 1: an image token image_weight for each 1 of a text token.

    Errors: ValueError for a weight that is negative, or that would change nothing or leave nothing.
    """
    if not 0 <= image_weight < float("inf"):
        raise ValueError(f"image weight is {image_weight}, expected a number from 0 up")
    is_image = torch.cat(list(sequences)) < 0
    if image_weight != 1 and not is_image.any():
        raise ValueError(f"image weight is {image_weight}, but calibration has no images")
    w = torch.where(is_image, image_weight, 1.0)
    if not w.sum():
        raise ValueError("with an image weight of 0, calibration needs text too")
    return w / w.mean()
