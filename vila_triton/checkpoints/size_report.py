"""What writing or loading a checkpoint will take, worked out from names, shapes and dtypes alone."""

from collections.abc import Iterator

from ..models.params import Lazy
from .sources import PARTS, Source
from .writing import in_form


def size(n: float) -> str:
    """Bytes for people: 1.35 GB, 20.4 MB, 512 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n} bytes"


def nbytes(tensors: Lazy) -> int:
    return sum(x.nbytes for x in tensors.meta.values())


def lines(source: Source, form: str) -> Iterator[str]:
    """A table: the parts, their tensors, their bytes in our memory layout and as written, the largest tensor."""
    _, written = in_form(source, form)
    yield source.described()
    yield f"{'':14}{'tensors':>8}{'loaded':>12}{'as ' + form:>16}{'largest tensor':>16}"
    for part in PARTS:
        held = written[part]
        largest = max((x.nbytes for x in held.meta.values()), default=0)
        loaded = nbytes(source.tensors[part])
        yield f"{part:14}{len(held):8}{size(loaded):>12}{size(nbytes(held)):>16}{size(largest):>16}"
    loaded, total = (sum(nbytes(held[part]) for part in PARTS) for held in (source.tensors, written))
    yield f"{'together':14}{sum(map(len, written.values())):8}{size(loaded):>12}{size(total):>16}"
