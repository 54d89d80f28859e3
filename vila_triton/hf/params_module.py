"""A tree of parameters as a torch module, so that `to`, `parameters`, `state_dict` and the like work on it."""

from typing import Any

from torch import Tensor, nn

from ..models.params import ParameterSpec, leaves, tree_map


class ParamsModule(nn.Module):
    """A module whose parameters are the leaves of a tree, under their checkpoint names."""

    def __init__(self, specs: Any, tree: Any):
        super().__init__()
        self.specs = specs
        for spec, leaf in zip(leaves(specs), leaves(tree), strict=True):
            *path, name = spec.key.split(".")
            module: nn.Module = self
            for child in path:
                if child not in module._modules:
                    module.add_module(child, nn.Module())
                module = module.get_submodule(child)
            module.register_parameter(name, nn.Parameter(leaf, requires_grad=leaf.is_floating_point()))

    @property
    def params(self) -> Any:
        """The parameters as the tree that the functional model takes."""

        def parameter(spec: ParameterSpec) -> Tensor:
            return self.get_parameter(spec.key)

        return tree_map(parameter, self.specs)
