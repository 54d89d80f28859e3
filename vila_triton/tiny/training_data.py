"""Training rows: token ids, who may see whom, and where the answers are.

Two kinds of row share one picture prefix `<s>USER: (<image> \\n)*n`:

* packed: many first rounds side by side. Each question and answer sees the prefix and itself, and its positions start
  after the prefix, so one pass over the pictures trains them all as if each stood alone.
* conversation: the rounds follow each other, each after a `USER:` and in sight of all before it.
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
from vila_triton.tiny.questions import QA, ask
from vila_triton.tiny.scenes import Scene, Split, draw, sample

IMAGE = -1  # stands for one feature of a picture until the embeddings take its place
FEATURES = 16  # of one picture
ROOM = 115  # tokens of questions and answers that fill a row

_TOKENIZER = tokenizer.build()
_ID = _TOKENIZER.get_vocab()


@dataclass(frozen=True)
class Answer:
    kind: str
    pictures: int
    conversation: bool
    start: int  # of the answer in the row or batch; its </s> is the last token before stop
    stop: int


@dataclass
class Row:
    ids: list[int]
    segments: list[int]  # 0 is seen by all that follows, any other number by itself only
    positions: list[int]
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Rows padded to one length: visible [b, s, s]."""

    rows: int
    length: int
    visible: Tensor


@dataclass(frozen=True)
class Batch:
    """All groups laid end to end (n tokens, padding included)."""

    ids: Tensor  # [n]
    positions: Tensor  # [n]
    pixels: Tensor  # [pictures, 3, 64, 64], in the order of their places in ids
    groups: list[Group]
    answers: list[Answer]

    def targets(self) -> tuple[Tensor, Tensor]:
        """Places of the answer tokens [m] and their weights [m], which tame long answers: 1 / sqrt(length) a token."""
        places = torch.cat([torch.arange(a.start, a.stop) for a in self.answers])
        lengths = torch.tensor([a.stop - a.start for a in self.answers])
        return places, (lengths**-0.5).repeat_interleave(lengths)


@functools.lru_cache(maxsize=1 << 16)
def encode(text: str) -> tuple[int, ...]:
    return tuple(_TOKENIZER.encode(text, add_special_tokens=False).ids)


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """64x64 RGB pictures as the image processor of the checkpoint yields them: [n, 3, 64, 64] in [-1, 1]."""
    stacked = torch.from_numpy(numpy.stack([numpy.asarray(picture) for picture in pictures]))
    return (stacked.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def row(rng: random.Random, scenes: Sequence[Scene], conversation: bool) -> Row:
    """The prefix of the scenes, and questions and answers until the row is full."""
    prefix = [_ID["<s>"], _ID["USER:"], *([IMAGE] * FEATURES + [_ID["\n"]]) * len(scenes)]
    out = Row(prefix.copy(), [0] * len(prefix), list(range(len(prefix))))
    full = len(prefix) + ROOM
    for turn in itertools.count():
        qa = ask(rng, scenes)
        question, answer = _round(qa, again=conversation and turn > 0)
        if turn and len(out.ids) + len(question) + len(answer) > full:
            return out
        start = len(out.ids) + len(question)
        out.ids += question + answer
        size = len(question) + len(answer)
        first = out.positions[-1] + 1 if conversation else len(prefix)
        out.positions += range(first, first + size)
        out.segments += [0 if conversation else turn + 1] * size
        out.answers.append(Answer(qa.kind, len(scenes), conversation, start, start + len(answer)))
    raise AssertionError("unreachable")


def _round(qa: QA, again: bool) -> tuple[list[int], list[int]]:
    question = [*([_ID["USER:"]] if again else []), *encode(qa.question), _ID["ASSISTANT:"]]
    return question, [*encode(qa.answer), _ID["</s>"]]


def batch(rng: random.Random, plan: Sequence[tuple[int, int, bool]], split: Split = "train") -> Batch:
    """Rows as planned: (rows, pictures a row, conversation) for each group."""
    ids, positions, pictures, groups, answers = [], [], [], [], []
    for count, per_row, conversation in plan:
        rows = []
        for _ in range(count):
            scenes = [sample(rng, split) for _ in range(per_row)]
            pictures += [draw(scene, rng) for scene in scenes]
            rows.append(row(rng, scenes, conversation))
        length = max(len(r.ids) for r in rows)
        groups.append(Group(count, length, _visible(rows, length)))
        for r in rows:
            answers += [
                Answer(a.kind, a.pictures, a.conversation, a.start + len(ids), a.stop + len(ids)) for a in r.answers
            ]
            ids += _pad(r.ids, length, _ID["<pad>"])
            positions += _pad(r.positions, length, 0)
    return Batch(torch.tensor(ids), torch.tensor(positions), pixels(pictures), groups, answers)


def _pad(values: list[int], length: int, value: int) -> list[int]:
    return values + [value] * (length - len(values))


def _visible(rows: Sequence[Row], length: int) -> Tensor:
    segments = torch.tensor([_pad(r.segments, length, -1) for r in rows])  # [b, s]
    queries, keys = segments[:, :, None], segments[:, None, :]
    return ((keys == 0) | (keys == queries)).tril()
