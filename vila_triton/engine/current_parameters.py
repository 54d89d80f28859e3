"""The parameters of a model while it answers: someone may give them other memory between two tokens."""

from torch import Tensor

from ..models.llama import Llama
from ..models.params import leaves, structure, tree_map


def addresses(tensors: list[Tensor]) -> list[int]:
    """The address of each tensor."""
    return list(map(Tensor.data_ptr, tensors))  # there are hundreds, at every token


class CurrentParameters:
    """A tree that is made anew whenever a parameter has other memory, as by `Module.to`: what a tree derives from its
    leaves (`Layer.qkv`) would still lie in the old.

    The memory of the tree is held, so that no other can come to lie at the same address meanwhile.
    """

    def __init__(self, p: Llama):
        self.leaves: list[Tensor] = leaves(p)
        self._take(p)

    def _take(self, p: Llama) -> None:
        self.tree = p
        self.held = [x.detach() for x in self.leaves]
        self.places = addresses(self.leaves), [x.dtype for x in self.leaves], structure(p)

    def get(self) -> Llama:
        """The tree for the next step; `places` then tells what leaves it has, where they lie, and in which dtypes."""
        if addresses(self.leaves) != self.places[0]:
            self._take(tree_map(lambda x: x, self.tree))
        return self.tree
