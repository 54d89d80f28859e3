"""Report how large a checkpoint is, from names, shapes and dtypes alone."""

from collections.abc import Iterator

from vila_triton.models.params import LazyTensors

from .sources import PARTS, CheckpointSource
from .writing import convert_layout


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes: 1.35 GB, 20.4 MB, 512 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} bytes"


def total_bytes(tensors: LazyTensors) -> int:
    """The bytes of all tensors together."""
    return sum(x.nbytes for x in tensors.meta.values())


def size_table(source: CheckpointSource, format_name: str) -> Iterator[str]:
    """A table of the parts: their tensors, bytes in the native layout and as written, and largest tensor."""
    _, converted = convert_layout(source, format_name)
    yield source.summary()
    yield f"{'':14}{'tensors':>8}{'loaded':>12}{'as ' + format_name:>16}{'largest tensor':>16}"
    for part in PARTS:
        tensors = converted[part]
        largest = max((x.nbytes for x in tensors.meta.values()), default=0)
        loaded, written = (format_bytes(total_bytes(x)) for x in (source.tensors[part], tensors))
        yield f"{part:14}{len(tensors):8}{loaded:>12}{written:>16}{format_bytes(largest):>16}"
    loaded, total = (sum(total_bytes(held[part]) for part in PARTS) for held in (source.tensors, converted))
    yield f"{'together':14}{sum(map(len, converted.values())):8}{format_bytes(loaded):>12}{format_bytes(total):>16}"
