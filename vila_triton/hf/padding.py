"""Padded batches, as Hugging Face passes them, to ragged rows and back."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.vila import IGNORE_INDEX, splice_image_tokens, splice_labels


def require_tensor(name: str, x: object, expected: str) -> None:
    """TypeError for what a model takes as a tensor and is none."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: a {type(x).__name__} is no {expected}, as VilaProcessor makes it")


@dataclass(frozen=True)
class UnpaddedBatch:
    """The rows of a batch without padding, and the places they have in the padded layout."""

    rows: list[Tensor]  # [t] spliced ids or [t, e] embeddings
    labels: list[Tensor] | None  # [t]
    positions: list[Tensor] | None  # [t]; None: what follows the cached tokens
    mask: Tensor  # [b, longest] bool


def pad(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Rows [t, ...] in their places, with 0 elsewhere: [b, places.shape[1], ...]."""
    out = rows[0].new_zeros((*mask.shape, *rows[0].shape[1:]))
    out[mask] = torch.cat(list(rows))
    return out


def pad_attentions(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Attention weights [h, t, t] of each row in their places, with 0 elsewhere: [b, h, longest, longest]."""
    out = rows[0].new_zeros(len(rows), len(rows[0]), *mask.shape[1:] * 2)
    for i, (row, row_mask) in enumerate(zip(rows, mask)):
        out[i, :, row_mask.nonzero(), row_mask.nonzero()[:, 0]] = row
    return out


def unpad(
    inputs: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
    tokens_per_image: Sequence[int],
    vocab_size: int,
    *,
    context_lens: Sequence[int] | None = None,
    max_length: int | None = None,
    padding_side: str = "right",
) -> UnpaddedBatch:
    """Take a batch apart: inputs are ids [b, t], in which pictures have one place each, or embeddings [b, t, e].

    attention_mask [b, t], or [b, past + t] if the past has as many ones as tokens are `cached`; position_ids [b, t'] or
    [1, t'] with t' the width after splicing; labels [b, t]. With pictures, rows longer than `max_length` lose their
    tail, with a warning, and padding moves to `padding_side`; without, it stays.

    Errors: ValueError naming the argument.
    """
    if inputs.ndim != 2 + inputs.is_floating_point() or not inputs.numel():
        raise ValueError(
            f"the input is {inputs.dtype} of shape {list(inputs.shape)}, expected at least one of whole ids [b, t] or "
            "embeddings [b, t, e]"
        )
    position_ids, labels = (x.to(inputs.device) if x is not None else None for x in (position_ids, labels))
    input_mask = parse_attention_mask(inputs, attention_mask, context_lens)
    if labels is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(f"labels have shape {list(labels.shape)}, expected {list(inputs.shape[:2])} like the inputs")
    rows = [row[m] for row, m in zip(inputs, input_mask)]
    label_rows = [row[m] for row, m in zip(labels, input_mask)] if labels is not None else None
    output_mask = input_mask
    if not inputs.is_floating_point():
        if label_rows is not None:
            label_rows = splice_labels(rows, label_rows, tokens_per_image) if tokens_per_image else label_rows
        rows = splice_image_tokens(rows, tokens_per_image, vocab_size)
    for row in label_rows or ():
        if (invalid := row[(row != IGNORE_INDEX) & ((row < 0) | (row >= vocab_size))]).numel():
            raise ValueError(
                f"label {int(invalid[0])} is not in the vocabulary of {vocab_size}, nor is it {IGNORE_INDEX}"
            )
    if tokens_per_image:
        if max_length and max(map(len, rows)) > max_length:
            warnings.warn("Inputs truncated!", stacklevel=3)
            rows = [row[:max_length] for row in rows]
            label_rows = [row[:max_length] for row in label_rows] if label_rows is not None else None
        output_mask = token_mask([len(row) for row in rows], padding_side).to(input_mask.device)
    return UnpaddedBatch(rows, label_rows, parse_position_ids(position_ids, output_mask), output_mask)


def parse_attention_mask(inputs: Tensor, attention_mask: Tensor | None, context_lens: Sequence[int] | None) -> Tensor:
    """The mask of the new tokens as bool [b, t]; every row must be one unbroken run."""
    b, t = inputs.shape[:2]
    if attention_mask is None:
        return torch.ones(b, t, dtype=torch.bool, device=inputs.device)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != b or attention_mask.shape[1] < t:
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}, expected [{b}, {t}] or wider")
    past, mask = attention_mask.to(inputs.device).bool().split([attention_mask.shape[1] - t, t], dim=1)
    if past.shape[1] and past.sum(1).tolist() != list(context_lens or [0] * b):
        raise ValueError(
            f"attention_mask allows {past.sum(1).tolist()} tokens before the new ones, but the cache holds "
            f"{list(context_lens or [0] * b)}"
        )
    starts = mask.int().diff(dim=1, prepend=mask.new_zeros(b, 1).int()) == 1
    if (starts.sum(1) > 1).any():
        raise ValueError("attention_mask has a row with a gap; padding can only be at its ends")
    if not mask.any(1).all():
        raise ValueError("attention_mask has a row without any token")
    return mask


def parse_position_ids(position_ids: Tensor | None, mask: Tensor) -> list[Tensor] | None:
    if position_ids is None:
        return None
    if position_ids.ndim != 2 or position_ids.shape[1] != mask.shape[1] or len(position_ids) not in (1, len(mask)):
        raise ValueError(
            f"position_ids have shape {list(position_ids.shape)}, expected {list(mask.shape)} (pictures widened)"
        )
    return [row[m] for row, m in zip(position_ids.expand(len(mask), -1), mask)]


def token_mask(lengths: Sequence[int], padding_side: str) -> Tensor:
    """Places [b, longest] of rows of these lengths, padded on the given side."""
    columns, row_lengths = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    return columns < row_lengths if padding_side == "right" else columns >= max(lengths) - row_lengths


def causal_loss(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy of every label but the first of its row, given the logits one before it; rows [t, v], [t]."""
    shifted_logits = torch.cat([row[:-1] for row in logits])
    targets = torch.cat([row[1:] for row in labels]).to(shifted_logits.device)
    if shifted_logits.dtype != torch.float64:
        shifted_logits = shifted_logits.float()
    return torch.nn.functional.cross_entropy(shifted_logits, targets, ignore_index=IGNORE_INDEX)
