"""The parameters of a model while it answers: someone may give them other memory between two tokens."""

import torch
from torch import Tensor

from ..models.llama import Llama
from ..models.params import leaves, tree_map


def addresses(tensors: list[Tensor]) -> list[tuple[int, torch.dtype]]:
    """The address and dtype of each tensor."""
    return [(x.data_ptr(), x.dtype) for x in tensors]


class CurrentParameters:
    """A tree that is made anew whenever a parameter has other memory, as by `Module.to`: what a tree derives from its
    leaves (`Layer.qkv`) would still lie in the old.
    """

    def __init__(self, p: Llama):
        self.tree = p
        self.leaves: list[Tensor] = leaves(p)
        self.addresses = addresses(self.leaves)

    def get(self) -> Llama:
        """The tree for the next step; `addresses` are then those of its leaves."""
        if (now := addresses(self.leaves)) != self.addresses:
            self.tree, self.addresses = tree_map(lambda x: x, self.tree), now
        return self.tree
