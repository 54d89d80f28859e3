"""Validates the fields of preprocessor_config.json that set an image processor; other fields are ignored."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..files.reading import short_repr
from ..models.config_fields import PixelCount, expected_instead


def is_number(value: Any) -> bool:
    """Return whether the value is a finite number of a sensible size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def is_side(value: Any) -> bool:
    """Return whether the value is a side in pixels."""
    return not expected_instead(PixelCount, value)


def is_size(value: Any, names: tuple[set[str], ...]) -> bool:
    """Return whether the value is a size: a side in pixels, or an object with one of these sets of keys."""
    return is_side(value) or (isinstance(value, dict) and set(value) in names and all(map(is_side, value.values())))


def is_per_channel(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    """Return whether the value is one valid item, or a list of three."""
    return is_valid(value) or (isinstance(value, list) and len(value) == 3 and all(map(is_valid, value)))


SQUARE, EDGE = {"height", "width"}, {"shortest_edge"}
FLAG = (lambda value: isinstance(value, bool), "true or false")
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"), FLAG),
    "do_pad": (lambda value: value is False, "false"),
    "resample": (lambda value: isinstance(value, int) and 0 <= value <= 5, "the number of a filter of Pillow, 0 to 5"),
    "rescale_factor": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "image_mean": (lambda value: is_per_channel(value, is_number), "a number, or one a channel"),
    "image_std": (
        lambda value: is_per_channel(value, lambda x: is_number(x) and x > 0),
        "a number above 0, or one a channel",
    ),
    "size": (lambda value: is_size(value, (SQUARE, EDGE)), "a side in pixels, height and width, or shortest_edge"),
    "crop_size": (lambda value: is_size(value, (SQUARE,)), "a side in pixels, or height and width"),
}


def image_processor_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an image processor. Errors: ValueError naming the field."""
    arguments = {name: values[name] for name in FIELDS if values.get(name) is not None}
    for name, value in arguments.items():
        is_valid, expectation = FIELDS[name]
        if not is_valid(value):
            raise ValueError(f"{name} is {short_repr(value)}, expected {expectation}")
    return arguments | {
        name: [arguments[name]] * 3 for name in ("image_mean", "image_std") if is_number(arguments.get(name))
    }
