"""A tree of parameters as a torch module, so that `to`, `parameters`, `state_dict` and the like work on it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..models.params import ParameterSpec, leaves, tree_map
from ..models.side_by_side import lay_side_by_side


class ParamsModule(nn.Module):
    """A module whose parameters are the leaves of a tree, under their checkpoint names.

    side_by_side: specs whose parameters are views of one storage, joined along an axis. They are laid there again
    whenever they have moved: by `to` and its kind, by `load_state_dict`, by a copy or a pickle of the module.
    """

    def __init__(self, specs: Any, tree: Any, side_by_side: Sequence[tuple[Sequence[ParameterSpec], int]] = ()):
        super().__init__()
        self.specs, self.side_by_side = specs, side_by_side
        self.latest: tuple[object, Any] = None, None  # the tree that `params` made last, and what it was made of
        for spec, leaf in zip(leaves(specs), leaves(tree), strict=True):
            *path, name = spec.key.split(".")
            module: nn.Module = self
            for child in path:
                if child not in module._modules:
                    module.add_module(child, nn.Module())
                module = module.get_submodule(child)
            module.register_parameter(name, nn.Parameter(leaf, requires_grad=leaf.is_floating_point()))
        self.register_load_state_dict_post_hook(join_after_loading)
        self.lay_side_by_side()

    def lay_side_by_side(self) -> None:
        """Move the parameters that shall share a storage into one, group by group; nothing happens to those that do."""
        for specs, axis in self.side_by_side:
            parts = [self.get_parameter(spec.key) for spec in specs]
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

    @property
    def params(self) -> Any:
        """The parameters as the tree that the functional model takes: the same one until a parameter is replaced,
        moved or written to. Writes to tensors made under `inference_mode` are not counted: of these it is always new.
        """
        parameters: dict[str, Tensor] = {}
        collect_parameters(self, "", parameters)
        made_of = [(id(x), x.data_ptr(), None if x.is_inference() else x._version) for x in parameters.values()]
        previous, tree = self.latest
        if previous != made_of or any(version is None for *_, version in made_of):
            tree = tree_map(lambda spec: parameters[spec.key], self.specs)
            self.latest = made_of, tree
        return tree


def collect_parameters(module: nn.Module, prefix: str, parameters: dict[str, Tensor]) -> None:
    """Add the parameters of a module to a dict by name; `named_parameters` takes many times as long."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            parameters[prefix + name] = parameter
    for name, child in module._modules.items():
        if child is not None:
            collect_parameters(child, f"{prefix}{name}.", parameters)


def join_after_loading(module: ParamsModule, incompatible_keys: Any) -> None:
    """Called after `load_state_dict`, which may have replaced parameters."""
    module.lay_side_by_side()
