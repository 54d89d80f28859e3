"""A tree of parameters as a torch module, so that `to`, `parameters`, `state_dict` and the like work on it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..models.layers import Affine
from ..models.params import ParameterSpec, leaves, tree_map, write_counts
from ..models.side_by_side import lay_side_by_side
from .linear_modules import Holder, Int4Linear, is_linear, linear_module, name_of
from .module_reading import ModuleReading


class ParamsModule(nn.Module):
    """A module whose parameters are the leaves of a tree, under their checkpoint names; a linear map is a module.

    side_by_side: specs whose parameters are views of one storage, joined along an axis. They are laid there again
    whenever they have moved: by `to` and its kind, by `load_state_dict`, by a copy or a pickle of the module.
    """

    def __init__(self, specs: Any, tree: Any, side_by_side: Sequence[tuple[Sequence[ParameterSpec], int]] = ()):
        super().__init__()
        self.specs, self.side_by_side = specs, side_by_side
        self.latest: tuple[object, Any] = None, None  # the tree that `params` made last, and what it was made of
        for spec, leaf in zip(leaves(specs, Affine), leaves(tree, Affine), strict=True):
            self._register(spec, leaf)
        self.register_load_state_dict_post_hook(join_after_loading)
        self.lay_side_by_side()

    def _register(self, spec: Any, leaf: Any) -> None:
        """Put what a spec declares in its place: a parameter, or a linear map."""
        if is_linear(spec):
            parent, _, name = name_of(spec).rpartition(".")
            self._container(parent).add_module(name, linear_module(leaf))
            return
        for s, x in zip(leaves(spec), leaves(leaf), strict=True):
            parent, _, name = s.key.rpartition(".")
            parameter = nn.Parameter(x, requires_grad=x.is_floating_point())
            self._container(parent).register_parameter(name, parameter)

    def _container(self, path: str) -> nn.Module:
        """The module of a path, which is made if it is not there."""
        module: nn.Module = self
        for child in filter(None, path.split(".")):
            if child not in module._modules:
                module.add_module(child, Holder())
            module = module.get_submodule(child)
        return module

    def lay_side_by_side(self) -> None:
        """Move the parameters that shall share a storage into one, group by group; nothing happens to those that do."""
        tensors = ModuleReading(self).tensors if self.side_by_side else {}
        for specs, axis in self.side_by_side:
            parts = [tensors[spec.key] for spec in specs]
            for parameter, view in zip(parts, lay_side_by_side(parts, axis), strict=True):
                parameter.data = view.data

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ParamsModule":
        super()._apply(fn, recurse)
        self.lay_side_by_side()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"latest": (None, None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lay_side_by_side()

    def requires_grad_(self, requires_grad: bool = True) -> "ParamsModule":
        """As of any module; int4 weights stay frozen."""
        frozen = {id(x) for m in self.modules() if isinstance(m, Int4Linear) for x in (m.qweight, m.scales, m.zeros)}
        for parameter in self.parameters():
            if id(parameter) not in frozen:
                parameter.requires_grad_(requires_grad)
        return self

    @property
    def params(self) -> Any:
        """The parameters as the tree that the functional model takes, with what active adapters add to them: the same
        tree until a parameter is replaced, moved or written to, or other adapters are active. Writes to tensors made
        under `inference_mode` are not counted: of these it is always new.

        Errors: TypeError for modules in the place of its own that it does not know (see `module_reading`).
        """
        reading = ModuleReading(self)
        counts = [(id(x), x.data_ptr(), None if x.is_inference() else x._version) for x in reading.all_tensors()]
        made_of = counts, reading.adapters()
        previous, tree = self.latest
        if previous != made_of or any(version is None for *_, version in counts):
            tree = tree_of(self.specs, reading)
            self.latest = made_of, tree
        return tree

    def versions(self) -> object:
        """A value that changes with a parameter that is replaced or written to (see `write_counts`), and with the
        adapters that are active or merged: to compare.
        """
        reading = ModuleReading(self)
        return write_counts(reading.all_tensors()), reading.adapters()


def tree_of(specs: Any, reading: ModuleReading) -> Any:
    """The tree that specs declare, of the tensors and low-rank terms that were read. Errors: TypeError for tensors that
    are missing or that it has no place for.
    """

    def with_low_rank(spec: Any) -> Any:
        return replace(spec, low_rank=reading.low_rank.get(name_of(spec), ())) if isinstance(spec, Affine) else spec

    def leaf(spec: ParameterSpec | Tensor) -> Tensor:
        if isinstance(spec, Tensor):  # of a low-rank term
            return spec
        if spec.key not in reading.tensors:
            raise TypeError(f"{spec.key} is no parameter of its module any more (as after pruning or weight_norm)")
        return reading.tensors[spec.key]

    tree = tree_map(leaf, tree_map(with_low_rank, specs, leaf_type=Affine) if reading.low_rank else specs)
    if unknown := reading.tensors.keys() - {spec.key for spec in leaves(specs)}:
        raise TypeError(f"{', '.join(sorted(unknown))}: the model has no such parameter, and would leave it out")
    return tree


def join_after_loading(module: ParamsModule, incompatible_keys: Any) -> None:
    """Called after `load_state_dict`, which may have replaced parameters."""
    module.lay_side_by_side()
