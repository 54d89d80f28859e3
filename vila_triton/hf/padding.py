"""Conversion between padded batches, as Hugging Face passes them, and lists of unpadded sequences."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.vila import IGNORE_INDEX, splice_image_tokens, splice_labels


def require_tensor(name: str, x: object, expected: str) -> None:
    """Errors: TypeError if x is not a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: a {type(x).__name__} is no {expected}, as VilaProcessor makes it")


@dataclass(frozen=True)
class UnpaddedBatch:
    """The sequences of a batch without padding, and a mask of where they lie in the padded layout."""

    rows: list[Tensor]  # [t] spliced ids or [t, e] embeddings
    labels: list[Tensor] | None  # [t]
    positions: list[Tensor] | None  # [t]; None: behind the cached tokens
    mask: Tensor  # [b, longest] bool


def pad(x: Tensor, mask: Tensor) -> Tensor:
    """Pad sequences that lie end to end, [s, ...], with zeros -> [b, longest, ...]; `mask` [b, longest] is true where
    their rows go. Where there is no padding, the result is a view.
    """
    if len(x) == mask.numel():
        return x.unflatten(0, mask.shape)
    out = x.new_zeros((*mask.shape, *x.shape[1:]))
    out[mask] = x
    return out


def pad_attentions(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Pad attention weights [h, t, t] of each sequence with zeros -> [b, h, longest, longest]."""
    out = rows[0].new_zeros(len(rows), len(rows[0]), *mask.shape[1:] * 2)
    for i, (row, row_mask) in enumerate(zip(rows, mask)):
        out[i, :, row_mask.nonzero(), row_mask.nonzero()[:, 0]] = row
    return out


def unpad_embeddings(
    embeddings: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    *,
    context_lens: Sequence[int] | None = None,
) -> UnpaddedBatch:
    """Unpad embeddings [b, t, e]; arguments and errors as in `unpad`."""
    mask, rows, label_rows = remove_padding(embeddings, attention_mask, labels, context_lens)
    check_labels(label_rows, vocab_size)
    return UnpaddedBatch(rows, label_rows, parse_position_ids(position_ids, mask), mask)


def unpad(
    ids: Tensor,
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
    """Unpad prompt ids [b, t], with one id for each image, and splice the positions of images into them.

    attention_mask [b, t], or [b, past + t] with as many ones in the past as `context_lens` says. position_ids [b, t']
    or [1, t'], t' the width after splicing. labels [b, t]. With images, sequences longer than `max_length` are
    truncated, with a warning, and padding moves to `padding_side`; without images it stays where it is.
    Errors: ValueError naming the argument.
    """
    mask, rows, label_rows = remove_padding(ids, attention_mask, labels, context_lens)
    if label_rows is not None and tokens_per_image:
        label_rows = splice_labels(rows, label_rows, tokens_per_image)
    rows = splice_image_tokens(rows, tokens_per_image, vocab_size)
    check_labels(label_rows, vocab_size)
    if tokens_per_image:
        if max_length and max(map(len, rows)) > max_length:
            warnings.warn("Inputs truncated!", stacklevel=3)
            rows = [row[:max_length] for row in rows]
            label_rows = [row[:max_length] for row in label_rows] if label_rows is not None else None
        mask = token_mask([len(row) for row in rows], padding_side).to(mask.device)
    return UnpaddedBatch(rows, label_rows, parse_position_ids(position_ids, mask), mask)


def remove_padding(
    inputs: Tensor, attention_mask: Tensor | None, labels: Tensor | None, context_lens: Sequence[int] | None
) -> tuple[Tensor, list[Tensor], list[Tensor] | None]:
    """The mask of the new tokens, and the rows of inputs and labels in it. Errors: ValueError naming the argument."""
    if inputs.ndim != 2 + inputs.is_floating_point() or not inputs.numel():
        raise ValueError(
            f"the input is {inputs.dtype} of shape {list(inputs.shape)}, expected at least one of whole ids [b, t] or "
            "embeddings [b, t, e]"
        )
    mask = parse_attention_mask(inputs, attention_mask, context_lens)
    if labels is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(f"labels have shape {list(labels.shape)}, expected {list(inputs.shape[:2])} like the inputs")
    if labels is not None and labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels are {labels.dtype}, expected torch.int64, of token ids and {IGNORE_INDEX}")
    rows = [row[m] for row, m in zip(inputs, mask)]
    return mask, rows, None if labels is None else [row[m] for row, m in zip(labels.to(inputs.device), mask)]


def check_any_label(labels: Sequence[Tensor]) -> None:
    """Errors: ValueError if there is no label of which the loss is the mean, which is then not a number."""
    if not any((row[1:] != IGNORE_INDEX).any() for row in labels):
        raise ValueError(f"labels: all are {IGNORE_INDEX} behind the first of each sequence, so there is no loss")


def check_labels(labels: Sequence[Tensor] | None, vocab_size: int) -> None:
    """Errors: ValueError for a label that is neither in the vocabulary nor `IGNORE_INDEX`."""
    for row in labels or ():
        if (invalid := row[(row != IGNORE_INDEX) & ((row < 0) | (row >= vocab_size))]).numel():
            raise ValueError(
                f"label {int(invalid[0])} is not in the vocabulary of {vocab_size}, nor is it {IGNORE_INDEX}"
            )


def parse_attention_mask(inputs: Tensor, attention_mask: Tensor | None, context_lens: Sequence[int] | None) -> Tensor:
    """The mask of the new tokens, bool [b, t]. Errors: ValueError unless each sequence is one run of tokens behind its
    cached ones.
    """
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
    """The positions of each unpadded sequence, or None. Errors: ValueError for another shape than that of `mask`."""
    if position_ids is None:
        return None
    if position_ids.ndim != 2 or position_ids.shape[1] != mask.shape[1] or len(position_ids) not in (1, len(mask)):
        raise ValueError(
            f"position_ids have shape {list(position_ids.shape)}, expected {list(mask.shape)} (images widened)"
        )
    return [row[m] for row, m in zip(position_ids.to(mask.device).expand(len(mask), -1), mask)]


def token_mask(lengths: Sequence[int], padding_side: str) -> Tensor:
    """The mask [b, longest] of sequences of these lengths, padded on the given side: true at tokens."""
    columns, row_lengths = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    return columns < row_lengths if padding_side == "right" else columns >= max(lengths) - row_lengths
