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


def param_specs(cfg: VilaConfig, dtype: torch.dtype) -> Vila:
    """The tree of a model."""
    return Vila(
        llama.param_specs(cfg.llm, dtype),
        vision.param_specs(cfg.vision_tower, dtype),
        projector.param_specs(cfg.mm_projector, dtype),
    )


def encode_images(p: Vila, pixels: Tensor, cfg: VilaConfig) -> Tensor:
    """Pictures [n, c, H, W] -> features [n, tokens, e]."""
    features = vision.forward(p.vision_tower, pixels, cfg.vision_tower)
    return projector.forward(p.mm_projector, features, cfg.mm_projector)


def splice_image_tokens(
    rows: Sequence[Tensor], tokens_per_image: Sequence[int], vocab_size: int, first_row: int = 0
) -> list[Tensor]:
    """Widen every picture's place to its positions; pictures are taken in order through the whole batch.

    rows: token ids [t] int64 each; image_tokens: the number of features of each picture; first_feature: the row where
    theirs begin -> rows [t'] int64.
    Errors: ValueError if the pictures are not as many as their places, or an id is not in the vocabulary.
    """
    ids = torch.cat(list(rows)) if rows else torch.empty(0, dtype=torch.int64)
    num_placeholders = int((ids == IMAGE_TOKEN_INDEX).sum())
    if num_placeholders != len(tokens_per_image):
        raise ValueError(
            f"the prompt has places for {num_placeholders} pictures, but {len(tokens_per_image)} were given"
        )
    text_ids = ids[ids != IMAGE_TOKEN_INDEX]
    if len(text_ids) and not (int(text_ids.min()) >= 0 and int(text_ids.max()) < vocab_size):
        invalid = int(text_ids.min()) if int(text_ids.min()) < 0 else int(text_ids.max())
        raise ValueError(f"token id {invalid} is not in the vocabulary of {vocab_size}, nor is it {IMAGE_TOKEN_INDEX}")
    sizes, start, spliced = list(tokens_per_image), first_row, []
    for row in rows:
        parts, begin = [], 0
        for position in (row == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist():
            n = sizes.pop(0)
            parts += [row[begin:position], -1 - torch.arange(start, start + n, device=row.device)]
            begin, start = position + 1, start + n
        spliced.append(torch.cat([*parts, row[begin:]]))
    return spliced


def splice_labels(rows: Sequence[Tensor], labels: Sequence[Tensor], tokens_per_image: Sequence[int]) -> list[Tensor]:
    """The labels of spliced rows: those of the words, and `IGNORE_INDEX` for every position of a picture."""
    sizes, spliced = list(tokens_per_image), []
    for row, label in zip(rows, labels, strict=True):
        counts = [sizes.pop(0) if image else 1 for image in (row == IMAGE_TOKEN_INDEX).tolist()]
        label = torch.where(row == IMAGE_TOKEN_INDEX, IGNORE_INDEX, label)
        spliced.append(label.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device=label.device)))
    return spliced


def embed_spliced(p: Vila, spliced_ids: Tensor, image_features: Tensor | None) -> Tensor:
    """A spliced row [s] and the picture features [rows, e] -> [s, e]."""
    if image_features is None:
        return llama.embed(p.llm, spliced_ids)
    text = llama.embed(p.llm, spliced_ids.clamp(min=0))
    return torch.where((spliced_ids < 0)[:, None], image_features[(-1 - spliced_ids).clamp(min=0)].to(text.dtype), text)
