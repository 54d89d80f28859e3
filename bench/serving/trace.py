"""Requests to a server: conversations about held-out scenes, whose right answers are known, and times of arrival.

All is drawn from a seed. Segments of a trace share no image, so that what a server has cached of one says nothing about
another; within a segment images come again, as the next turn of a conversation or the first of another.
"""

import io
import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from PIL.Image import Resampling

from vila_triton.paths import config_dir
from vila_triton.tiny.evaluate import SUPPORTED_KINDS
from vila_triton.tiny.questions import QA, random_question
from vila_triton.tiny.scenes import Scene, draw_scene, random_scene

DESCRIPTION = "description"


@dataclass(frozen=True)
class TraceMix:
    """The shares of requests; configs/bench/serve.toml has them."""

    new_images: list[float]
    sides: list[int]
    asked_before: float
    next_turn: float
    turns: int
    descriptions: float


@dataclass(frozen=True)
class Limits:
    """The limits of a run; configs/bench/serve.toml has them."""

    answer_tokens: int
    right: float
    fewer: float
    request_seconds: float
    start_seconds: float


@dataclass(frozen=True)
class Request:
    """A conversation up to a question. `images` are PNG files, shown before the first of `earlier` turns, or before the
    question if there are none. `gap` is the time since the request before it, in mean gaps.
    """

    images: tuple[bytes, ...]
    earlier: tuple[QA, ...]
    question: QA
    gap: float

    @property
    def answer(self) -> str:
        return self.question.answer


@cache
def serve_config() -> tuple[TraceMix, Limits]:
    """Returns what configs/bench/serve.toml says."""
    tables = tomllib.loads((config_dir() / "bench" / "serve.toml").read_text())
    return TraceMix(**tables["trace"]), Limits(**tables["limits"])


@dataclass(frozen=True)
class Album:
    """Images that were asked about, what they show, and the turns of one conversation about them."""

    scenes: tuple[Scene, ...]
    images: tuple[bytes, ...]
    turns: tuple[QA, ...] = ()


def build_trace(mix: TraceMix, count: int, seed: int, segment: int) -> list[Request]:
    """Returns the requests of a segment: the same ones for the same arguments, and fewer are the first of more."""
    rng = random.Random(f"{seed}/{segment}")
    albums: list[Album] = []
    requests = []
    for _ in range(count):
        gap = rng.expovariate(1)
        if albums and rng.random() < mix.asked_before:
            old = rng.choice(albums)
            goes_on = rng.random() < mix.next_turn and len(old.turns) < mix.turns
            album = old if goes_on else Album(old.scenes, old.images)
        else:
            album = new_album(rng, mix)
        question = draw_question(rng, album.scenes, mix.descriptions)
        requests.append(Request(album.images, album.turns, question, gap))
        albums.append(Album(album.scenes, album.images, (*album.turns, question)))
    return requests


def new_album(rng: random.Random, mix: TraceMix) -> Album:
    """Returns one, two or three new images, without a turn."""
    (count,) = rng.choices((1, 2, 3), weights=mix.new_images)
    scenes = tuple(random_scene(rng, "held_out") for _ in range(count))
    return Album(scenes, tuple(encode_png(rng, scene, rng.choice(mix.sides)) for scene in scenes))


def encode_png(rng: random.Random, scene: Scene, side: int) -> bytes:
    """Returns a drawing of a scene, `side` pixels wide and high, as a PNG file."""
    file = io.BytesIO()
    draw_scene(scene, rng).resize((side, side), Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def draw_question(rng: random.Random, scenes: Sequence[Scene], descriptions: float) -> QA:
    """Returns a question about these scenes, of a kind that the bundled model answers well."""
    kinds = SUPPORTED_KINDS[len(scenes)]
    if DESCRIPTION in kinds and rng.random() < descriptions:
        return random_question(rng, scenes, DESCRIPTION)
    kinds = [kind for kind in kinds if kind != DESCRIPTION]
    while True:
        try:
            return random_question(rng, scenes, rng.choice(kinds))
        except ValueError:  # these scenes allow none of this kind
            continue


@dataclass(frozen=True)
class Segment:
    """The first `count` requests of a segment of the trace that a seed makes."""

    seed: int
    number: int
    count: int

    @property
    def requests(self) -> list[Request]:
        return segment_requests(self)


@lru_cache(4)
def segment_requests(segment: Segment) -> list[Request]:
    """Returns the requests of a segment, with the shares of configs/bench/serve.toml."""
    return build_trace(serve_config()[0], segment.count, segment.seed, segment.number)
