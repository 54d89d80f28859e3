"""The coverage of a config in earlier runs of `check`, so that the next one goes on with other examples.

It is kept until the kernel, an op, the config, Triton, the device or a check changes, in a file for each config in
FOLDER.
"""

from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from vila_triton.files.atomic import write_json
from vila_triton.files.reading import read_json
from vila_triton.hashing import canonical_json, short_hash
from vila_triton.registry import OPS, Impl
from vila_triton.registry.tuned_tables import kernel_hash

from ..measure import rows
from .error_budget import DEVICE, INTERPRETED
from .tiles import Edge, TileCoverage

FOLDER = rows.CACHE / "check"


def coverage_file(impl: Impl, config: Mapping[str, Any], target: str | None = None) -> Path:
    """The file of a config of an implementation, named after all that its coverage depends on.

    target: of what is compiled for it and emulated.
    """
    op = OPS[impl.op]
    sources = [*sorted(op.file.parent.glob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]
    runs_on = f"{target or DEVICE} {INTERPRETED} {metadata.version('triton')}"
    parts = kernel_hash(impl), repr(op.domain), canonical_json(dict(config)), runs_on, *map(Path.read_text, sources)
    return FOLDER / f"{op.name}-{impl.name}-{short_hash(*(part.encode() for part in parts))}.json"


def load_coverage(file: Path) -> tuple[int, TileCoverage]:
    """The number of runs that found nothing wrong, and what they covered. Errors: ValueError for another's file."""
    if not file.exists():
        return 0, TileCoverage()
    try:
        kept = read_json(file)
        tiles: dict[tuple[str, str], dict[int, set[int]]] = {}
        for constant, axis, block, counts in kept["tiles"]:
            tiles.setdefault((constant, axis), {})[block] = set(counts)
        return kept["runs"], TileCoverage({Edge(**x) for x in kept["edges"]}, tiles)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold what check covered ({error}); remove it") from None


def save_coverage(file: Path, runs: int, coverage: TileCoverage) -> None:
    """Keep what so many runs covered."""
    tiles = [
        (*key, block, sorted(counts)) for key, blocks in coverage.tiles.items() for block, counts in blocks.items()
    ]
    kept = {"runs": runs, "edges": [asdict(x) for x in sorted(coverage.edges, key=repr)], "tiles": sorted(tiles)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, kept)
