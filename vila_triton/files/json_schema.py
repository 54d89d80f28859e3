"""What JSON of a known kind must hold: which fields, and values of which types.

    {"op": str, "seconds": float, "reason": (str, None), "ranges": [{"sizes": dict}]}

is an object with at least these fields; a type, one of several, or a list each item of which has the form.
"""

import sys
from typing import Any

from .reading import LoadError, short_repr

TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list", None: "null"}


def require_schema(value: Any, schema: Any, where: object) -> None:
    """Errors: `LoadError` that begins with `where` and names the field, what it is and what was expected."""
    if isinstance(schema, dict):
        require_schema(value, dict, where)
        for name, field_schema in schema.items():
            if name not in value:
                raise LoadError(f"{where} has no {name}")
            require_schema(value[name], field_schema, f"{where}, {name}")
    elif isinstance(schema, list):
        require_schema(value, list, where)
        for i, item in enumerate(value):
            require_schema(item, schema[0], f"{where} {i}")
    else:
        types = schema if isinstance(schema, tuple) else (schema,)
        if not any(is_json_type(value, kind) for kind in types):
            raise LoadError(
                f"{where} is {short_repr(value)}, expected {' or '.join(TYPE_NAMES[kind] for kind in types)}"
            )


def is_json_type(value: Any, expected: type | None) -> bool:
    """Whether a value is of a type as JSON has them: true is no number, a whole one is a number too."""
    if expected is None or value is None or isinstance(value, bool):
        return value is expected
    if expected is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, expected)
