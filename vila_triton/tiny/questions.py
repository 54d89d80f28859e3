"""Questions about scenes, each with exactly one right answer.

About one image a question speaks directly; about several it names the image ("in the second image") or compares them.
The functions that make questions return None when the scenes allow no unambiguous question of their kind.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vila_triton.tiny.scenes import COLORS, POSITIONS, SHAPES, Scene

ORDINALS = ("first", "second", "third")

QuestionAnswer = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class QA:
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class QuestionKind:
    """A function that makes questions about one scene (`about_one`) or about several at once (`about_several`)."""

    group: str
    weight: float
    about_one: Callable[[random.Random, Scene, str], QuestionAnswer | None] | None = None
    about_several: Callable[[random.Random, Sequence[Scene]], QuestionAnswer | None] | None = None


def phrase(color: str | None, shape: str | None) -> str:
    """("red", "circle") -> "red circle"; a missing shape becomes "shape"."""
    return " ".join(word for word in (color, shape or "shape") if word)


def describe(scene: Scene) -> str:
    """Describe a scene in sentences: the number of shapes, then each in reading order."""
    count = scene.count()
    head = "there is 1 shape." if count == 1 else f"there are {count} shapes."
    return " ".join([head, *(f"a {thing} at the {thing.position}." for thing in scene.things)])


def _target_attributes(rng: random.Random, scene: Scene, p_absent: float) -> tuple[str, str]:
    """Return color and shape of a thing of the scene; with probability `p_absent` one of the two is drawn anew."""
    thing = rng.choice(scene.things)
    if rng.random() >= p_absent:
        return thing.color, thing.shape
    if rng.random() < 0.5:
        return rng.choice(list(COLORS)), thing.shape
    return thing.color, rng.choice(SHAPES)


def _drop_attribute(rng: random.Random, color: str, shape: str) -> tuple[str | None, str | None]:
    """Return both attributes or one of them and None, at random."""
    return rng.choice(((color, shape), (color, shape), (color, None), (None, shape)))


def _make_count_question(color: bool, shape: bool) -> Callable[[random.Random, Scene, str], QuestionAnswer]:
    def make(rng: random.Random, scene: Scene, location: str) -> QuestionAnswer:
        target_color, target_shape = _target_attributes(rng, scene, p_absent=0.4)
        attributes = (target_color if color else None, target_shape if shape else None)
        return f"How many {phrase(*attributes)}s are there{location}?", str(scene.count(*attributes))

    return make


def _color_question(rng: random.Random, scene: Scene, location: str) -> QuestionAnswer | None:
    unique = [t for t in scene.things if scene.count(shape=t.shape) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    return f"What colour is the {thing.shape}{location}?", thing.color


def _shape_question(rng: random.Random, scene: Scene, location: str) -> QuestionAnswer | None:
    unique = [t for t in scene.things if scene.count(color=t.color) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    return f"What shape is the {thing.color} object{location}?", thing.shape


def _position_question(rng: random.Random, scene: Scene, location: str) -> QuestionAnswer | None:
    thing = rng.choice(scene.things)
    attributes = _drop_attribute(rng, thing.color, thing.shape)
    if scene.count(*attributes) != 1:
        return None
    return f"Where is the {phrase(*attributes)}{location}?", thing.position


def _existence_question(rng: random.Random, scene: Scene, location: str) -> QuestionAnswer:
    attributes = _drop_attribute(rng, *_target_attributes(rng, scene, p_absent=0.8))
    return f"Is there a {phrase(*attributes)}{location}?", "yes" if scene.count(*attributes) else "no"


def _cell_question(rng: random.Random, scene: Scene, location: str) -> QuestionAnswer:
    cell = rng.choice(scene.things).cell if rng.random() < 0.7 else rng.randrange(len(POSITIONS))
    thing = scene.thing_at(cell)
    return f"What is at the {POSITIONS[cell]}{location}?", f"a {thing}" if thing else "nothing"


def _description_question(rng: random.Random, scene: Scene, location: str) -> QuestionAnswer:
    return f"Describe the {location.removeprefix(' in the ') or 'picture'}.", describe(scene)


def _majority_question(rng: random.Random, scene: Scene, location: str) -> QuestionAnswer | None:
    counts = sorted((scene.count(color=color), color) for color in COLORS)
    (second, _), (most, color) = counts[-2:]
    return (f"Which colour has more shapes{location}?", color) if most > second > 0 else None


def _which_image_question(rng: random.Random, scenes: Sequence[Scene]) -> QuestionAnswer | None:
    scene = rng.choice(scenes)
    thing = rng.choice(scene.things)
    attributes = _drop_attribute(rng, thing.color, thing.shape)
    if sum(other.count(*attributes) > 0 for other in scenes) != 1:
        return None
    return f"Which image has a {phrase(*attributes)}?", f"the {ORDINALS[scenes.index(scene)]}"


def _total_question(rng: random.Random, scenes: Sequence[Scene]) -> QuestionAnswer | None:
    if len(scenes) != 2:
        return None
    target = _target_attributes(rng, rng.choice(scenes), p_absent=0.2)
    attributes = rng.choice(((None, None), _drop_attribute(rng, *target)))
    total = sum(scene.count(*attributes) for scene in scenes)
    return f"How many {phrase(*attributes)}s are there in total?", str(total)


def _more_question(rng: random.Random, scenes: Sequence[Scene]) -> QuestionAnswer | None:
    target = _target_attributes(rng, rng.choice(scenes), p_absent=0.0)
    attributes = rng.choice(((None, None), _drop_attribute(rng, *target)))
    counts = [scene.count(*attributes) for scene in scenes]
    if len(scenes) != 2 or counts[0] == counts[1]:
        return None
    return f"Which image has more {phrase(*attributes)}s?", f"the {ORDINALS[counts.index(max(counts))]}"


KINDS: dict[str, QuestionKind] = {
    "count shape": QuestionKind("counting", 1.0, about_one=_make_count_question(color=False, shape=True)),
    "count colour": QuestionKind("counting", 1.0, about_one=_make_count_question(color=True, shape=False)),
    "count pair": QuestionKind("counting", 1.0, about_one=_make_count_question(color=True, shape=True)),
    "count all": QuestionKind("counting", 0.6, about_one=_make_count_question(color=False, shape=False)),
    "colour": QuestionKind("colour", 1.2, about_one=_color_question),
    "shape": QuestionKind("shape", 1.2, about_one=_shape_question),
    "where": QuestionKind("position", 1.2, about_one=_position_question),
    "at": QuestionKind("position", 1.2, about_one=_cell_question),
    "exists": QuestionKind("yes/no", 1.2, about_one=_existence_question),
    "description": QuestionKind("description", 1.2, about_one=_description_question),
    "which": QuestionKind("comparing images", 1.5, about_several=_which_image_question),
    "total": QuestionKind("comparing images", 1.5, about_several=_total_question),
    "more": QuestionKind("comparing images", 2.0, about_several=_more_question),
}
# Of no use to the bundled model as it is: `vila_triton.tiny.finetune` teaches it one.
NEW_KINDS: dict[str, QuestionKind] = {
    "majority": QuestionKind("comparing colours", 1.0, about_one=_majority_question),
}
KIND_GROUPS: dict[str, str] = {kind: entry.group for kind, entry in (KINDS | NEW_KINDS).items()}


def random_question(rng: random.Random, scenes: Sequence[Scene], kind: str | None = None) -> QA:
    """Return a question about the scenes, of this kind or of a random one of `KINDS`; a kind that does not fit is drawn
    again.

    Errors: ValueError if the scenes allow no question of this kind.
    """
    for _ in range(100):
        (kind_name,) = (kind,) if kind else rng.choices(list(KINDS), [k.weight for k in KINDS.values()])
        entry, pair = KINDS.get(kind_name) or NEW_KINDS[kind_name], None
        if entry.about_one:
            index = rng.randrange(len(scenes))
            pair = entry.about_one(rng, scenes[index], _location_phrase(rng, index, len(scenes)))
        elif entry.about_several and len(scenes) > 1:
            pair = entry.about_several(rng, scenes)
        if pair:
            return QA(kind_name, *pair)
    raise ValueError(f"no question of kind {kind!r} fits these scenes: {scenes}")


def _location_phrase(rng: random.Random, index: int, count: int) -> str:
    if count > 1:
        return f" in the {ORDINALS[index]} image"
    return " in the picture" if rng.random() < 0.2 else ""
