"""What writing or loading a checkpoint will take, worked out from names, shapes and dtypes alone."""

from collections.abc import Iterator

from ..models.params import LazyTensors
from .sources import PARTS, CheckpointSource
from .writing import convert_layout


def format_bytes(num_bytes: float) -> str:
    """Bytes for people: 1.35 GB, 20.4 MB, 512 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} bytes"


def total_bytes(tensors: LazyTensors) -> int:
    return sum(x.nbytes for x in tensors.meta.values())


def size_table(source: CheckpointSource, format_name: str) -> Iterator[str]:
    """A table: the parts, their tensors, their bytes in our memory layout and as written, the largest tensor."""
    _, converted = convert_layout(source, format_name)
    yield source.summary()
    yield f"{'':14}{'tensors':>8}{'loaded':>12}{'as ' + format_name:>16}{'largest tensor':>16}"
    for part in PARTS:
        tensors = converted[part]
        largest = max((x.nbytes for x in tensors.meta.values()), default=0)
        loaded = total_bytes(source.tensors[part])
        yield f"{part:14}{len(tensors):8}{format_bytes(loaded):>12}{format_bytes(total_bytes(tensors)):>16}{format_bytes(largest):>16}"
    loaded, total = (sum(total_bytes(held[part]) for part in PARTS) for held in (source.tensors, converted))
    yield f"{'together':14}{sum(map(len, converted.values())):8}{format_bytes(loaded):>12}{format_bytes(total):>16}"
