"""Check JSON values against a schema: which fields there must be, and of which types.

    {"op": str, "seconds": float, "reason": (str, None), "ranges": [{"sizes": dict}]}

A dictionary is an object with at least these fields, a tuple one of several types, a list of one schema a list whose
items all fit it.
"""

import sys
from typing import Any

from .reading import LoadError, short_repr

TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list", None: "null"}


def require_schema(value: Any, schema: Any, where: object) -> None:
    """Check a value against a schema. Errors: `LoadError` that begins with `where` and names the field and what it must
    be.
    """
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
    """True if a value has a type in JSON's sense: true is no number, and a whole number is also a float."""
    if expected is None or value is None or isinstance(value, bool):
        return value is expected
    if expected is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, expected)
