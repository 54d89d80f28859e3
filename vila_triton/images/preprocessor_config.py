"""What a preprocessor_config.json says of pictures, field by field; what else stands there is nobody's here."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..files.reading import shown
from ..models.config_fields import Side, expected


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def side(value: Any) -> bool:
    return not expected(Side, value)


def sides(value: Any, names: tuple[set[str], ...]) -> bool:
    """A size as older versions write it, one side, or as newer ones, by name."""
    return side(value) or (isinstance(value, dict) and set(value) in names and all(map(side, value.values())))


def channels(value: Any, fine: Callable[[Any], bool]) -> bool:
    return fine(value) or (isinstance(value, list) and len(value) == 3 and all(map(fine, value)))


SQUARE, EDGE = {"height", "width"}, {"shortest_edge"}
FLAG = (lambda value: isinstance(value, bool), "true or false")
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"), FLAG),
    "do_pad": (lambda value: value is False, "false"),
    "resample": (lambda value: isinstance(value, int) and 0 <= value <= 5, "the number of a filter of Pillow, 0 to 5"),
    "rescale_factor": (lambda value: number(value) and value > 0, "a number above 0"),
    "image_mean": (lambda value: channels(value, number), "a number, or one a channel"),
    "image_std": (lambda value: channels(value, lambda x: number(x) and x > 0), "a number above 0, or one a channel"),
    "size": (lambda value: sides(value, (SQUARE, EDGE)), "a side in pixels, height and width, or shortest_edge"),
    "crop_size": (lambda value: sides(value, (SQUARE,)), "a side in pixels, or height and width"),
}


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an image processor. Errors: ValueError naming the field."""
    said = {name: values[name] for name in FIELDS if values.get(name) is not None}
    for name, value in said.items():
        fine, wanted = FIELDS[name]
        if not fine(value):
            raise ValueError(f"{name} is {shown(value)}, expected {wanted}")
    return said | {name: [said[name]] * 3 for name in ("image_mean", "image_std") if number(said.get(name))}
