"""Trees of parameters: frozen dataclasses and tuples of them, with tensors as leaves.

Each part of the model declares its tree once, with a `ParameterSpec` at each leaf. From this declaration random
parameters are drawn, checkpoints loaded and checked, and parameters counted.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from vila_triton.files.reading import LoadError, join_items
from vila_triton.ops import Int4
from vila_triton.ops.int4_tiles import tiled_shape
from vila_triton.ops.int4_weight import check_int4_shape

from .config_fields import ConfigError
from .side_by_side import joined_shape, split_storage

Tree = TypeVar("Tree")
CHECKSUM_WIDTH = 1024  # integers in a row


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter before it has data: shape, name in the checkpoint, dtype, and distribution of its random
    initialization.
    """

    shape: tuple[int, ...]
    key: str
    dtype: torch.dtype
    init: Literal["normal", "ones", "zeros", "codes"] = "normal"

    def init_tensor(self, rng: torch.Generator | None) -> Tensor:
        """Draw a tensor of this shape and dtype on the CPU."""
        if self.init == "ones":
            return torch.ones(self.shape, dtype=self.dtype)
        if self.init == "zeros":
            return torch.zeros(self.shape, dtype=self.dtype)
        if self.init == "codes":
            return torch.randint(-(2**31), 2**31, self.shape, generator=rng).to(self.dtype)
        std = 1 / math.sqrt(math.prod(self.shape[1:]) or 1)
        return (torch.randn(self.shape, generator=rng) * std).to(self.dtype)


@dataclass(frozen=True)
class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, read when they are accessed.

    meta: each tensor on torch's meta device, for its shape and dtype. read: return a tensor. release: hint that the
    memory behind a tensor may be freed; the tensor stays valid as long as nobody has written to it.
    """

    meta: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    release: Callable[[str], None] = lambda name: None

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "LazyTensors":
        """Wrap tensors that are in memory already."""
        return cls({name: x.to("meta") for name, x in tensors.items()}, tensors.__getitem__)

    def rename(self, names: Mapping[str, str]) -> "LazyTensors":
        """Select tensors under other names; `names` maps each new name to the present one."""
        meta = {new: self.meta[old] for new, old in names.items()}
        return LazyTensors(meta, lambda new: self.read(names[new]), lambda new: self.release(names[new]))


def weight_spec(
    n: int, k: int, key: str, dtype: torch.dtype, group_size: int | None = None, rounding: Any = "sub"
) -> Any:
    """Spec of a linear's weight [n, k]: a `ParameterSpec`, or an `Int4` of them if `group_size` is given (-1: one group
    of all k inputs).

    Errors: `ConfigError` if k cannot be divided into such groups.
    """
    if group_size is None:
        return ParameterSpec((n, k), f"{key}.weight", dtype)
    group_size = k if group_size == -1 else group_size
    try:
        check_int4_shape(k, group_size)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    return Int4(
        ParameterSpec(tiled_shape(n, k), f"{key}.qweight", torch.int32, "codes"),
        ParameterSpec((k // group_size, n), f"{key}.scales", dtype),
        ParameterSpec((k // group_size, n), f"{key}.zeros", dtype, "ones"),
        group_size,
        rounding,
    )


def tree_map(f: Callable[..., Any], tree: Tree, *others: Tree, leaf_type: type | tuple[()] = ()) -> Tree:
    """Apply f to each leaf, and to the corresponding leaves of the other trees; everything that is no leaf stays as it
    is. What is of the type `leaf_type` is taken for a leaf, too.
    """
    if isinstance(tree, leaf_type):
        return f(tree, *others)
    if tree is None or isinstance(tree, int | float | str):
        return tree
    if isinstance(tree, tuple):
        return tuple(tree_map(f, *parts, leaf_type=leaf_type) for parts in zip(tree, *others, strict=True))  # pyright: ignore
    if is_dataclass(tree) and not isinstance(tree, ParameterSpec):
        names = [field.name for field in fields(tree)]
        parts = ((getattr(x, name) for x in (tree, *others)) for name in names)
        return type(tree)(*(tree_map(f, *values, leaf_type=leaf_type) for values in parts))
    return f(tree, *others)


def leaves(tree: Any, leaf_type: type | tuple[()] = ()) -> list[Any]:
    """The leaves of a tree in the order of declaration; what is of the type `leaf_type` is taken for one, too."""
    if isinstance(tree, leaf_type):
        return [tree]
    if tree is None or isinstance(tree, int | float | str):
        return []
    if is_dataclass(tree) and not isinstance(tree, ParameterSpec):
        tree = tuple(getattr(tree, field.name) for field in fields(tree))
    return [leaf for part in tree for leaf in leaves(part, leaf_type)] if isinstance(tree, tuple) else [tree]


def structure(tree: Tree) -> Tree:
    """The tree without its leaves, to compare: what there is, and the numbers that are no tensors."""
    return tree_map(lambda leaf: None, tree)


def checksum(parameters: Sequence[Tensor]) -> int:
    """A 64-bit checksum of the bytes of all parameters, independent of the device.

    The bytes are read as rows of int64. The sums of each row and each column are then added with weights by their
    position, so that exchanged values change the checksum too.
    """

    def sums(x: Tensor) -> list[Tensor]:
        flat = x.detach().contiguous().flatten().view(torch.uint8)
        flat = flat.clone() if flat.storage_offset() % 8 else flat  # view(int64) needs alignment
        integers, tail_bytes = flat[: len(flat) // 8 * 8].view(torch.int64), flat[len(flat) // 8 * 8 :]
        matrix = integers[: len(integers) // CHECKSUM_WIDTH * CHECKSUM_WIDTH].view(-1, CHECKSUM_WIDTH)
        return [matrix.sum(0), matrix.sum(1), integers[matrix.numel() :], tail_bytes.long()]

    totals = torch.cat([part for x in parameters for part in sums(x)])
    weights = 2 * torch.arange(len(totals), device=totals.device) + 1
    return int(((totals ^ totals >> 29) * weights).sum())


def write_counts(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Address and write count of each parameter; they change when a parameter is replaced or written in place.

    torch does not count writes through `.data`, nor writes to tensors made under `inference_mode`: the checksum stands
    in for the count of the latter.
    """
    return [(x.data_ptr(), checksum([x]) if x.is_inference() else x._version) for x in parameters]


def init_tree(specs: Tree, rng: torch.Generator | None = None) -> Tree:
    """Draw random parameters for a tree of specs."""
    return tree_map(lambda spec: spec.init_tensor(rng), specs)


def num_parameters(tree: Any) -> int:
    """Count the elements of a tree of specs or tensors; an int32 with eight int4 codes counts as one."""
    return sum(math.prod(leaf.shape) for leaf in leaves(tree))


def load_tree(
    specs: Tree,
    tensors: LazyTensors,
    source: str,
    ignore: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
    side_by_side: Sequence[tuple[Sequence[ParameterSpec], int]] = (),
) -> Tree:
    """Fill a tree of specs from a checkpoint, one tensor at a time, onto the device and in the declared dtypes.

    side_by_side: specs whose tensors become views of one storage, joined along an axis.

    Errors: one `LoadError`, beginning with `source`, that lists every missing and misshapen tensor, every unexpected
    one whose name does not start with an entry of `ignore`, and every integer tensor where floating point was declared
    or vice versa.
    """
    check_state_dict(specs, tensors.meta, source, ignore)

    places: dict[str, Tensor] = {}
    for parts, axis in side_by_side:
        whole = torch.empty(joined_shape(parts, axis), dtype=parts[0].dtype, device=device)
        places.update(zip((spec.key for spec in parts), split_storage(whole, parts, axis), strict=True))

    def load_leaf(spec: ParameterSpec) -> Tensor:
        x = tensors[spec.key]
        leaf = places[spec.key].copy_(x) if spec.key in places else x.to(device, spec.dtype)
        if leaf.data_ptr() != x.data_ptr():
            tensors.release(spec.key)
        return leaf

    return tree_map(load_leaf, specs)


def check_state_dict(specs: Any, meta: Mapping[str, Tensor], source: str, ignore: tuple[str, ...] = ()) -> None:
    """Errors: `LoadError` listing all tensors that `load_tree` would refuse."""
    problems = list(mismatches(specs, meta, ignore))
    if problems:
        lines = join_items(problems, max_items=20, separator="\n  ")
        raise LoadError(f"{source}: {len(problems)} of its tensors do not fit the model:\n  {lines}")


def mismatches(specs: Any, tensors: Mapping[str, Tensor], ignore: tuple[str, ...]) -> Iterator[str]:
    """Describe each difference between a tree of specs and a checkpoint's tensors, one line each."""
    specs_by_key = {spec.key: spec for spec in leaves(specs)}
    for key, spec in specs_by_key.items():
        if key not in tensors:
            yield f"missing     {key} {list(spec.shape)}"
        elif tuple(tensors[key].shape) != spec.shape:
            yield f"misshapen   {key} {list(tensors[key].shape)}, expected {list(spec.shape)}"
        elif tensors[key].is_floating_point() != spec.dtype.is_floating_point:
            yield f"wrong dtype {key} {tensors[key].dtype}, expected {spec.dtype}"
    for key in tensors:
        if key not in specs_by_key and not key.startswith(ignore or "\0"):
            yield f"unexpected  {key} {list(tensors[key].shape)}"
