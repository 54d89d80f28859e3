"""Params trees: frozen dataclasses, tuples of them, and leaves. A part declares its tree once, with `Spec` leaves;
the same declaration makes random parameters, loads a checkpoint and counts what there is.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from vila_triton.checkpoints.int4_packing import tiles
from vila_triton.files.reading import LoadError, listed
from vila_triton.ops import Int4
from vila_triton.ops.int4 import check_int4

from .config_fields import ConfigError

T = TypeVar("T")
SIDE = 1024  # integers of a row, of which a checksum has the sum


@dataclass(frozen=True)
class Spec:
    """A leaf before it has a value: its shape, its name in the checkpoint, its dtype, how it starts out."""

    shape: tuple[int, ...]
    key: str
    dtype: torch.dtype
    init: Literal["normal", "ones", "zeros", "codes"] = "normal"

    def tensor(self, rng: torch.Generator | None) -> Tensor:
        if self.init == "ones":
            return torch.ones(self.shape, dtype=self.dtype)
        if self.init == "zeros":
            return torch.zeros(self.shape, dtype=self.dtype)
        if self.init == "codes":
            return torch.randint(-(2**31), 2**31, self.shape, generator=rng).to(self.dtype)
        std = 1 / math.sqrt(math.prod(self.shape[1:]) or 1)
        return (torch.randn(self.shape, generator=rng) * std).to(self.dtype)


@dataclass(frozen=True)
class Lazy(Mapping[str, Tensor]):
    """Tensors by name, made when they are asked for.

    meta: name -> a tensor on torch's meta device: the shape and dtype. forget: told that the memory of one may go; it
    stays valid, as long as nobody wrote to it.
    """

    meta: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    forget: Callable[[str], None] = lambda name: None

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    @classmethod
    def of(cls, held: Mapping[str, Tensor]) -> "Lazy":
        """Tensors that are there already."""
        return cls({name: x.to("meta") for name, x in held.items()}, held.__getitem__)

    def named(self, names: Mapping[str, str]) -> "Lazy":
        """Some of them under other names: new name -> the one here."""
        meta = {new: self.meta[old] for new, old in names.items()}
        return Lazy(meta, lambda new: self.read(names[new]), lambda new: self.forget(names[new]))


def weight(n: int, k: int, key: str, dtype: torch.dtype, group: int | None = None, order: Any = "sub") -> Any:
    """The declaration of a linear's weight [n, k]: a `Spec`, or an `Int4` of them if a group size is given (-1: k).

    Errors: `ConfigError` for groups that are none of k.
    """
    if group is None:
        return Spec((n, k), f"{key}.weight", dtype)
    group = k if group == -1 else group
    try:
        check_int4(k, group)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    return Int4(
        Spec(tiles(n, k), f"{key}.qweight", torch.int32, "codes"),
        Spec((k // group, n), f"{key}.scales", dtype),
        Spec((k // group, n), f"{key}.zeros", dtype, "ones"),
        group,
        order,
    )


def tree_map(f: Callable[..., Any], tree: T, *rest: T) -> T:
    """The same tree with f applied to its leaves (and to those of the others, leaf by leaf); all else stays."""
    if tree is None or isinstance(tree, int | str):
        return tree
    if isinstance(tree, tuple):
        return tuple(tree_map(f, *parts) for parts in zip(tree, *rest, strict=True))  # pyright: ignore
    if is_dataclass(tree) and not isinstance(tree, Spec):
        names = [field.name for field in fields(tree)]
        return type(tree)(*(tree_map(f, getattr(tree, n), *(getattr(r, n) for r in rest)) for n in names))
    return f(tree, *rest)


def leaves(tree: Any) -> list[Any]:
    """The leaves, in the order of declaration."""
    found: list[Any] = []
    tree_map(found.append, tree)
    return found


def checksum(parameters: Sequence[Tensor]) -> int:
    """A number that other bytes change, and the same in other places: of the bytes as integers of 64 bits the sums of
    rows and of columns, which then count by their place.
    """

    def sums(x: Tensor) -> list[Tensor]:
        flat = x.detach().contiguous().flatten().view(torch.uint8)
        flat = flat.clone() if flat.storage_offset() % 8 else flat  # which cannot be seen as integers of 8 bytes
        words, rest = flat[: len(flat) // 8 * 8].view(torch.int64), flat[len(flat) // 8 * 8 :]
        square = words[: len(words) // SIDE * SIDE].view(-1, SIDE)
        return [square.sum(0), square.sum(1), words[square.numel() :], rest.long()]

    parts = torch.cat([part for x in parameters for part in sums(x)])
    places = 2 * torch.arange(len(parts), device=parts.device) + 1
    return int(((parts ^ parts >> 29) * places).sum())


def written(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What changes when parameters are replaced or written to: where each lies, and how often torch has counted a write
    to it. It counts none through `.data`, nor any to a tensor made under `inference_mode`: of such a one the checksum.
    """
    return [(x.data_ptr(), checksum([x]) if x.is_inference() else x._version) for x in parameters]


def init(specs: T, rng: torch.Generator | None = None) -> T:
    """Random parameters for a declared tree."""
    return tree_map(lambda spec: spec.tensor(rng), specs)


def count(tree: Any) -> int:
    """Numbers in a tree, declared or real (an int4 word counts as one)."""
    return sum(math.prod(leaf.shape) for leaf in leaves(tree))


def load(specs: T, tensors: Lazy, where: str, ignore: tuple[str, ...] = (), device: torch.device | str = "cpu") -> T:
    """The declared tree filled from a checkpoint's tensors, one at a time: onto the device, in the declared dtypes.

    Errors: `LoadError`, in one message, for every missing, unexpected (unless its name starts with one of `ignore`)
    and misshapen tensor, and for one whose kind (whole numbers or real) is not the declared one.
    """
    require_fit(specs, tensors.meta, where, ignore)

    def take(spec: Spec) -> Tensor:
        x = tensors[spec.key]
        taken = x.to(device, spec.dtype)
        if taken.data_ptr() != x.data_ptr():
            tensors.forget(spec.key)
        return taken

    return tree_map(take, specs)


def require_fit(specs: Any, meta: Mapping[str, Tensor], where: str, ignore: tuple[str, ...] = ()) -> None:
    """`LoadError` with everything that `load` would find wrong."""
    problems = list(mismatches(specs, meta, ignore))
    if problems:
        lines = listed(problems, most=20, between="\n  ")
        raise LoadError(f"{where}: {len(problems)} of its tensors do not fit the model:\n  {lines}")


def mismatches(specs: Any, tensors: Mapping[str, Tensor], ignore: tuple[str, ...]) -> Iterator[str]:
    declared = {spec.key: spec for spec in leaves(specs)}
    for key, spec in declared.items():
        if key not in tensors:
            yield f"missing     {key} {list(spec.shape)}"
        elif tuple(tensors[key].shape) != spec.shape:
            yield f"misshapen   {key} {list(tensors[key].shape)}, expected {list(spec.shape)}"
        elif tensors[key].is_floating_point() != spec.dtype.is_floating_point:
            yield f"wrong dtype {key} {tensors[key].dtype}, expected {spec.dtype}"
    for key in tensors:
        if key not in declared and not key.startswith(ignore or "\0"):
            yield f"unexpected  {key} {list(tensors[key].shape)}"
