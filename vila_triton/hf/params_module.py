"""A params tree as a torch module, so that the tools made for modules (to, parameters, state_dict) work on it."""

from typing import Any

from torch import Tensor, nn

from ..models.params import Spec, leaves, tree_map


class Part(nn.Module):
    """A params tree as a module: its leaves are parameters under their checkpoint names, `params` is the tree."""

    def __init__(self, specs: Any, tree: Any):
        super().__init__()
        self.specs = specs
        for spec, leaf in zip(leaves(specs), leaves(tree), strict=True):
            *path, name = spec.key.split(".")
            module: nn.Module = self
            for step in path:
                if step not in module._modules:
                    module.add_module(step, nn.Module())
                module = module.get_submodule(step)
            module.register_parameter(name, nn.Parameter(leaf, requires_grad=leaf.is_floating_point()))

    @property
    def params(self) -> Any:
        def leaf(spec: Spec) -> Tensor:
            return self.get_parameter(spec.key)

        return tree_map(leaf, self.specs)
