"""What JSON of a known kind must hold: which fields, and values of which types.

    {"op": str, "seconds": float, "reason": (str, None), "ranges": [{"sizes": dict}]}

is an object with at least these fields; a type, one of several, or a list each item of which has the form.
"""

import sys
from typing import Any

from .reading import LoadError, shown

WORDS = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list", None: "null"}


def require_form(value: Any, form: Any, where: object) -> None:
    """Errors: `LoadError` that begins with `where` and names the field, what it is and what was expected."""
    if isinstance(form, dict):
        require_form(value, dict, where)
        for name, of in form.items():
            if name not in value:
                raise LoadError(f"{where} has no {name}")
            require_form(value[name], of, f"{where}, {name}")
    elif isinstance(form, list):
        require_form(value, list, where)
        for i, item in enumerate(value):
            require_form(item, form[0], f"{where} {i}")
    else:
        kinds = form if isinstance(form, tuple) else (form,)
        if not any(is_a(value, kind) for kind in kinds):
            raise LoadError(f"{where} is {shown(value)}, expected {' or '.join(WORDS[kind] for kind in kinds)}")


def is_a(value: Any, kind: type | None) -> bool:
    """Whether a value is of a type as JSON has them: true is no number, a whole one is a number too."""
    if kind is None or value is None or isinstance(value, bool):
        return value is kind
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)
