"""The whole model, and where images stand in a prompt.

There are two codings of a sequence as int64 ids:

prompt ids     a token id, or IMAGE_TOKEN_INDEX once for a whole image
spliced ids    one id for each position: a token id, or -1 - r for row r of the image features

`splice_image_tokens` turns the first into the second. It is arithmetic on integers; embeddings are only computed for
the positions that a step runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import llama, projector, vision
from .config import VilaConfig

IGNORE_INDEX = -100  # a label that does not count in the loss
IMAGE_TOKEN_INDEX = -200  # an image in prompt ids


@dataclass(frozen=True)
class Vila:
    """The parameters of the whole model."""

    llm: llama.Llama
    vision_tower: vision.Tower
    mm_projector: projector.Projector


def param_specs(cfg: VilaConfig, dtype: torch.dtype) -> Vila:
    """Specs of the whole model."""
    return Vila(
        llama.param_specs(cfg.llm, dtype),
        vision.param_specs(cfg.vision_tower, dtype),
        projector.param_specs(cfg.mm_projector, dtype),
    )


def feature_rows(x: Tensor) -> Tensor:
    """Spliced ids of image positions to rows of the image features, and back: -1 - x."""
    return -1 - x


def encode_images(p: Vila, pixels: Tensor, cfg: VilaConfig, checkpointing: bool = False) -> Tensor:
    """Encode images [n, c, H, W] -> image features [n, tokens, e], by the vision tower and the projector."""
    features = vision.forward(p.vision_tower, pixels, cfg.vision_tower, checkpointing)
    return projector.forward(p.mm_projector, features, cfg.mm_projector)


def splice_image_tokens(
    rows: Sequence[Tensor], tokens_per_image: Sequence[int], vocab_size: int, first_row: int = 0
) -> list[Tensor]:
    """Splice image positions into prompts: prompt ids [t] of each sequence -> spliced ids [t'] of each.

    tokens_per_image: positions of each image, in the order of the images through the whole batch; first_row: the row of
    the image features at which the first of them begins.
    Errors: ValueError if there are not as many images as places for them, or for an id that is not in the vocabulary.
    """
    ids = torch.cat(list(rows)) if rows else torch.empty(0, dtype=torch.int64)
    num_placeholders = int((ids == IMAGE_TOKEN_INDEX).sum())
    if num_placeholders != len(tokens_per_image):
        raise ValueError(f"the prompt has places for {num_placeholders} images, but {len(tokens_per_image)} were given")
    text_ids = ids[ids != IMAGE_TOKEN_INDEX]
    if len(text_ids) and not (int(text_ids.min()) >= 0 and int(text_ids.max()) < vocab_size):
        invalid = int(text_ids.min()) if int(text_ids.min()) < 0 else int(text_ids.max())
        raise ValueError(f"token id {invalid} is not in the vocabulary of {vocab_size}, nor is it {IMAGE_TOKEN_INDEX}")
    sizes, start, spliced = list(tokens_per_image), first_row, []
    for row in rows:
        parts, begin = [], 0
        for position in (row == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist():
            n = sizes.pop(0)
            parts += [row[begin:position], feature_rows(torch.arange(start, start + n, device=row.device))]
            begin, start = position + 1, start + n
        spliced.append(torch.cat([*parts, row[begin:]]))
    return spliced


def splice_labels(rows: Sequence[Tensor], labels: Sequence[Tensor], tokens_per_image: Sequence[int]) -> list[Tensor]:
    """Splice labels as `splice_image_tokens` does their prompts; the positions of an image get `IGNORE_INDEX`."""
    sizes, spliced = list(tokens_per_image), []
    for row, label in zip(rows, labels, strict=True):
        counts = [sizes.pop(0) if image else 1 for image in (row == IMAGE_TOKEN_INDEX).tolist()]
        label = torch.where(row == IMAGE_TOKEN_INDEX, IGNORE_INDEX, label)
        spliced.append(label.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device=label.device)))
    return spliced


def embed_spliced(p: Vila, spliced_ids: Tensor, image_features: Tensor | None) -> Tensor:
    """Embed spliced ids [s], with image features [rows, e] -> [s, e]."""
    if image_features is None:
        return llama.embed(p.llm, spliced_ids)
    text = llama.embed(p.llm, spliced_ids.clamp(min=0))
    features = image_features[feature_rows(spliced_ids).clamp(min=0)].to(text.dtype)
    return torch.where((spliced_ids < 0)[:, None], features, text)
