"""Questions about scenes, each with exactly one right answer.

With one picture a question speaks of it directly; with several it names the picture ("in the second image") or compares
them. A maker returns None when the scenes leave no unambiguous question of its kind.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vila_triton.tiny.scenes import COLOURS, POSITIONS, SHAPES, Scene

ORDINALS = ("first", "second", "third")

Pair = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class QA:
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Kind:
    """A maker of questions about one scene (`about`) or about several at once (`across`)."""

    group: str
    weight: float
    about: Callable[[random.Random, Scene, str], Pair | None] | None = None
    across: Callable[[random.Random, Sequence[Scene]], Pair | None] | None = None


def name(colour: str | None, shape: str | None) -> str:
    """("red", "circle") -> "red circle"; a missing shape becomes "shape"."""
    return " ".join(word for word in (colour, shape or "shape") if word)


def describe(scene: Scene) -> str:
    """The multi-sentence description: how many shapes, then each in reading order."""
    count = scene.count()
    head = "there is 1 shape." if count == 1 else f"there are {count} shapes."
    return " ".join([head, *(f"a {thing} at the {thing.position}." for thing in scene.things)])


def _target(rng: random.Random, scene: Scene, absent: float) -> tuple[str, str]:
    """Colour and shape of a thing of the scene; with probability `absent` one of the two is drawn anew."""
    thing = rng.choice(scene.things)
    if rng.random() >= absent:
        return thing.colour, thing.shape
    if rng.random() < 0.5:
        return rng.choice(list(COLOURS)), thing.shape
    return thing.colour, rng.choice(SHAPES)


def _blur(rng: random.Random, colour: str, shape: str) -> tuple[str | None, str | None]:
    """Sometimes forgets the colour or the shape, so that phrases name one or both."""
    return rng.choice(((colour, shape), (colour, shape), (colour, None), (None, shape)))


def _count(colour: bool, shape: bool) -> Callable[[random.Random, Scene, str], Pair]:
    def make(rng: random.Random, scene: Scene, place: str) -> Pair:
        some_colour, some_shape = _target(rng, scene, absent=0.4)
        what = (some_colour if colour else None, some_shape if shape else None)
        return f"How many {name(*what)}s are there{place}?", str(scene.count(*what))

    return make


def _colour(rng: random.Random, scene: Scene, place: str) -> Pair | None:
    unique = [t for t in scene.things if scene.count(shape=t.shape) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    return f"What colour is the {thing.shape}{place}?", thing.colour


def _shape(rng: random.Random, scene: Scene, place: str) -> Pair | None:
    unique = [t for t in scene.things if scene.count(colour=t.colour) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    return f"What shape is the {thing.colour} object{place}?", thing.shape


def _where(rng: random.Random, scene: Scene, place: str) -> Pair | None:
    thing = rng.choice(scene.things)
    what = _blur(rng, thing.colour, thing.shape)
    if scene.count(*what) != 1:
        return None
    return f"Where is the {name(*what)}{place}?", thing.position


def _exists(rng: random.Random, scene: Scene, place: str) -> Pair:
    what = _blur(rng, *_target(rng, scene, absent=0.8))
    return f"Is there a {name(*what)}{place}?", "yes" if scene.count(*what) else "no"


def _at(rng: random.Random, scene: Scene, place: str) -> Pair:
    cell = rng.choice(scene.things).cell if rng.random() < 0.7 else rng.randrange(len(POSITIONS))
    thing = scene.at(cell)
    return f"What is at the {POSITIONS[cell]}{place}?", f"a {thing}" if thing else "nothing"


def _description(rng: random.Random, scene: Scene, place: str) -> Pair:
    return f"Describe the {place.removeprefix(' in the ') or 'picture'}.", describe(scene)


def _which(rng: random.Random, scenes: Sequence[Scene]) -> Pair | None:
    scene = rng.choice(scenes)
    thing = rng.choice(scene.things)
    what = _blur(rng, thing.colour, thing.shape)
    if sum(other.count(*what) > 0 for other in scenes) != 1:
        return None
    return f"Which image has a {name(*what)}?", f"the {ORDINALS[scenes.index(scene)]}"


def _total(rng: random.Random, scenes: Sequence[Scene]) -> Pair | None:
    if len(scenes) != 2:
        return None
    what = rng.choice(((None, None), _blur(rng, *_target(rng, rng.choice(scenes), absent=0.2))))
    return f"How many {name(*what)}s are there in total?", str(sum(scene.count(*what) for scene in scenes))


def _more(rng: random.Random, scenes: Sequence[Scene]) -> Pair | None:
    what = rng.choice(((None, None), _blur(rng, *_target(rng, rng.choice(scenes), absent=0.0))))
    counts = [scene.count(*what) for scene in scenes]
    if len(scenes) != 2 or counts[0] == counts[1]:
        return None
    return f"Which image has more {name(*what)}s?", f"the {ORDINALS[counts.index(max(counts))]}"


KINDS: dict[str, Kind] = {
    "count shape": Kind("counting", 1.0, about=_count(colour=False, shape=True)),
    "count colour": Kind("counting", 1.0, about=_count(colour=True, shape=False)),
    "count pair": Kind("counting", 1.0, about=_count(colour=True, shape=True)),
    "count all": Kind("counting", 0.6, about=_count(colour=False, shape=False)),
    "colour": Kind("colour", 1.2, about=_colour),
    "shape": Kind("shape", 1.2, about=_shape),
    "where": Kind("position", 1.2, about=_where),
    "at": Kind("position", 1.2, about=_at),
    "exists": Kind("yes/no", 1.2, about=_exists),
    "description": Kind("description", 1.2, about=_description),
    "which": Kind("comparing pictures", 1.5, across=_which),
    "total": Kind("comparing pictures", 1.5, across=_total),
    "more": Kind("comparing pictures", 2.0, across=_more),
}
GROUPS: dict[str, str] = {kind: entry.group for kind, entry in KINDS.items()}


def ask(rng: random.Random, scenes: Sequence[Scene], kind: str | None = None) -> QA:
    """One question about the scenes, of the given kind or of a random one; kinds that do not fit are drawn again.

    Raises ValueError when the scenes allow no question of the given kind.
    """
    for _ in range(100):
        (drawn,) = (kind,) if kind else rng.choices(list(KINDS), [k.weight for k in KINDS.values()])
        entry, pair = KINDS[drawn], None
        if entry.about:
            index = rng.randrange(len(scenes))
            pair = entry.about(rng, scenes[index], _place(rng, index, len(scenes)))
        elif entry.across and len(scenes) > 1:
            pair = entry.across(rng, scenes)
        if pair:
            return QA(drawn, *pair)
    raise ValueError(f"no question of kind {kind!r} fits these scenes: {scenes}")


def _place(rng: random.Random, index: int, count: int) -> str:
    if count > 1:
        return f" in the {ORDINALS[index]} image"
    return " in the picture" if rng.random() < 0.2 else ""
