"""Short hashes of bytes, and a canonical text of plain data to take them of."""

import hashlib
import json
from typing import Any


def short_hash(*parts: bytes) -> str:
    """Twelve hex digits that change with any of the parts."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def canonical_json(value: Any) -> str:
    """JSON in which equal values have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
