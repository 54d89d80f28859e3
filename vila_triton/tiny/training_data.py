"""Training rows: token ids, attention masks, and the positions of the answers.

Two kinds of row share one image prefix `<s>USER: (<image> \\n)*n`:

* packed: many first turns side by side. Each question and answer attends to the prefix and itself, and its positions
  start after the prefix, so one pass over the images trains them all as if each stood alone.
* conversation: the turns follow each other, each after a `USER:`, and attend to all before them.
"""

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import torch
from PIL import Image
from torch import Tensor

from vila_triton.tiny import tokenizer
from vila_triton.tiny.questions import QA, random_question
from vila_triton.tiny.scenes import Scene, Split, draw_scene, random_scene

IMAGE_FEATURE = -1  # stands for one image feature until the embeddings replace it
FEATURES_PER_IMAGE = 16
TOKENS_PER_ROW = 115  # tokens of questions and answers that fill a row

_TOKENIZER = tokenizer.build_tokenizer()
_TOKEN_IDS = _TOKENIZER.get_vocab()


@dataclass(frozen=True)
class Answer:
    kind: str
    num_images: int
    conversation: bool
    start: int  # of the answer in the row or batch; its </s> is the last token before stop
    stop: int


@dataclass
class TrainingRow:
    ids: list[int]
    segments: list[int]  # all that follows attends to segment 0, to another segment only itself
    positions: list[int]
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True)
class RowGroup:
    """Rows padded to one length; `mask` [b, s, s] is True where a query attends to a key."""

    rows: int
    length: int
    mask: Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """All groups end to end (n tokens, padding included)."""

    ids: Tensor  # [n]
    positions: Tensor  # [n]
    pixels: Tensor  # [images, 3, 64, 64], in the order in which ids refer to them
    groups: list[RowGroup]
    answers: list[Answer]

    def targets(self) -> tuple[Tensor, Tensor]:
        """Return the indices [m] of the answer tokens and their weights [m]: 1 / sqrt(length of the answer)."""
        token_indices = torch.cat([torch.arange(a.start, a.stop) for a in self.answers])
        lengths = torch.tensor([a.stop - a.start for a in self.answers])
        return token_indices, (lengths**-0.5).repeat_interleave(lengths)


@functools.lru_cache(maxsize=1 << 16)
def encode(text: str) -> tuple[int, ...]:
    """Return the token ids of a text, without the special tokens of a beginning or an end."""
    return tuple(_TOKENIZER.encode(text, add_special_tokens=False).ids)


def preprocess(images: Sequence[Image.Image]) -> Tensor:
    """Convert 64x64 RGB images as the image processor of the checkpoint does: to [n, 3, 64, 64] in [-1, 1]."""
    stacked = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images]))
    return (stacked.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def build_row(rng: random.Random, scenes: Sequence[Scene], conversation: bool) -> TrainingRow:
    """Build a row of the image prefix, and of questions and answers until it is full."""
    prefix = [
        _TOKEN_IDS["<s>"],
        _TOKEN_IDS["USER:"],
        *([IMAGE_FEATURE] * FEATURES_PER_IMAGE + [_TOKEN_IDS["\n"]]) * len(scenes),
    ]
    training_row = TrainingRow(prefix.copy(), [0] * len(prefix), list(range(len(prefix))))
    max_length = len(prefix) + TOKENS_PER_ROW
    for turn in itertools.count():
        qa = random_question(rng, scenes)
        question, answer = _turn_ids(qa, later_turn=conversation and turn > 0)
        if turn and len(training_row.ids) + len(question) + len(answer) > max_length:
            return training_row
        start = len(training_row.ids) + len(question)
        training_row.ids += question + answer
        num_tokens = len(question) + len(answer)
        first_position = training_row.positions[-1] + 1 if conversation else len(prefix)
        training_row.positions += range(first_position, first_position + num_tokens)
        training_row.segments += [0 if conversation else turn + 1] * num_tokens
        training_row.answers.append(Answer(qa.kind, len(scenes), conversation, start, start + len(answer)))
    raise AssertionError("unreachable")


def _turn_ids(qa: QA, later_turn: bool) -> tuple[list[int], list[int]]:
    question = [*([_TOKEN_IDS["USER:"]] if later_turn else []), *encode(qa.question), _TOKEN_IDS["ASSISTANT:"]]
    return question, [*encode(qa.answer), _TOKEN_IDS["</s>"]]


def build_batch(rng: random.Random, plan: Sequence[tuple[int, int, bool]], split: Split = "train") -> TrainingBatch:
    """Build a batch by a plan of (rows, images per row, conversation) for each group."""
    ids, positions, images, groups, answers = [], [], [], [], []
    for count, images_per_row, conversation in plan:
        rows: list[TrainingRow] = []
        for _ in range(count):
            scenes = [random_scene(rng, split) for _ in range(images_per_row)]
            images += [draw_scene(scene, rng) for scene in scenes]
            rows.append(build_row(rng, scenes, conversation))
        length = max(len(r.ids) for r in rows)
        groups.append(RowGroup(count, length, _attention_mask(rows, length)))
        for r in rows:
            answers += [
                Answer(a.kind, a.num_images, a.conversation, a.start + len(ids), a.stop + len(ids)) for a in r.answers
            ]
            ids += _pad(r.ids, length, _TOKEN_IDS["<pad>"])
            positions += _pad(r.positions, length, 0)
    return TrainingBatch(torch.tensor(ids), torch.tensor(positions), preprocess(images), groups, answers)


def _pad(values: list[int], length: int, value: int) -> list[int]:
    return values + [value] * (length - len(values))


def _attention_mask(rows: Sequence[TrainingRow], length: int) -> Tensor:
    segments = torch.tensor([_pad(r.segments, length, -1) for r in rows])  # [b, s]
    queries, keys = segments[:, :, None], segments[:, None, :]
    return ((keys == 0) | (keys == queries)).tril()
