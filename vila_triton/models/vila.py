"""The whole model: where pictures stand between words, and the three parts in a row.

A prompt is a row of token ids in which each picture is one `IMAGE_TOKEN_INDEX`. `splice` turns it into a row with one
number for every position: a token id, or -1 - r for row r of the picture features. Splicing is thus arithmetic on
integers, and embeddings are made only for the positions a step needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import llama, projector, vision
from .config import VilaConfig

IGNORE_INDEX = -100  # a label that does not count
IMAGE_TOKEN_INDEX = -200  # the place of a picture in a prompt


@dataclass(frozen=True)
class Vila:
    llm: Any  # llama.Llama
    vision_tower: Any  # vision.Tower
    mm_projector: Any  # projector.Projector


def declare(cfg: VilaConfig, dtype: torch.dtype) -> Vila:
    """The tree of a model."""
    return Vila(
        llama.declare(cfg.llm, dtype),
        vision.declare(cfg.vision_tower, dtype),
        projector.declare(cfg.mm_projector, dtype),
    )


def encode_images(p: Vila, pixels: Tensor, cfg: VilaConfig) -> Tensor:
    """Pictures [n, c, H, W] -> features [n, tokens, e]."""
    features = vision.vision_tower(p.vision_tower, pixels, cfg.vision_tower)
    return projector.projector(p.mm_projector, features, cfg.mm_projector)


def splice(
    rows: Sequence[Tensor], image_tokens: Sequence[int], vocab_size: int, first_feature: int = 0
) -> list[Tensor]:
    """Widen every picture's place to its positions; pictures are taken in order through the whole batch.

    rows: token ids [t] int64 each; image_tokens: the number of features of each picture; first_feature: the row where
    theirs begin -> rows [t'] int64.
    Errors: ValueError if the pictures are not as many as their places, or an id is not in the vocabulary.
    """
    ids = torch.cat(list(rows)) if rows else torch.empty(0, dtype=torch.int64)
    places = int((ids == IMAGE_TOKEN_INDEX).sum())
    if places != len(image_tokens):
        raise ValueError(f"the prompt has places for {places} pictures, but {len(image_tokens)} were given")
    words = ids[ids != IMAGE_TOKEN_INDEX]
    if len(words) and not (int(words.min()) >= 0 and int(words.max()) < vocab_size):
        bad = int(words.min()) if int(words.min()) < 0 else int(words.max())
        raise ValueError(f"token id {bad} is not in the vocabulary of {vocab_size}, nor is it {IMAGE_TOKEN_INDEX}")
    sizes, start, spliced = list(image_tokens), first_feature, []
    for row in rows:
        parts, begin = [], 0
        for place in (row == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist():
            n = sizes.pop(0)
            parts += [row[begin:place], -1 - torch.arange(start, start + n, device=row.device)]
            begin, start = place + 1, start + n
        spliced.append(torch.cat([*parts, row[begin:]]))
    return spliced


def splice_labels(rows: Sequence[Tensor], labels: Sequence[Tensor], image_tokens: Sequence[int]) -> list[Tensor]:
    """The labels of spliced rows: those of the words, and `IGNORE_INDEX` for every position of a picture."""
    sizes, spliced = list(image_tokens), []
    for row, label in zip(rows, labels, strict=True):
        counts = [sizes.pop(0) if image else 1 for image in (row == IMAGE_TOKEN_INDEX).tolist()]
        label = torch.where(row == IMAGE_TOKEN_INDEX, IGNORE_INDEX, label)
        spliced.append(label.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device=label.device)))
    return spliced


def embed(p: Vila, row: Tensor, features: Tensor | None) -> Tensor:
    """A spliced row [s] and the picture features [rows, e] -> [s, e]."""
    if features is None:
        return llama.embed(p.llm, row)
    words = llama.embed(p.llm, row.clamp(min=0))
    return torch.where((row < 0)[:, None], features[(-1 - row).clamp(min=0)].to(words.dtype), words)
