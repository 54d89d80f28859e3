"""The draws of `vila_triton.engine` in Python's numbers, to be compared with."""

from collections.abc import Callable
from itertools import accumulate, count

import torch
from torch import Tensor

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The output of splitmix64 that follows a state, after the reference in C of Vigna."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def random_part(seed: int, index: int) -> float:
    """The number in [0, 1) that a sequence draws its token number `index` with."""
    return (splitmix64(seed * 0xD1342543DE82EF95 + index * 0x9E3779B97F4A7C15) >> 11) / 2**53


def draw_token(probabilities: Tensor, seed: int, index: int) -> int:
    """Draw a token by probabilities [v]: the first up to which they exceed a random part of their sum."""
    parts = list(accumulate(probabilities.tolist()))
    goal = random_part(seed, index) * parts[-1]
    return next(token for token, part in enumerate(parts) if part > goal)


def multinomial(seed: int) -> Callable[..., Tensor]:
    """A `torch.multinomial` for one sequence that draws as the engine does with this seed."""
    index = count()

    def draw(probabilities: Tensor, num_samples: int) -> Tensor:
        return torch.tensor([[draw_token(row, seed, next(index))] for row in probabilities])

    return draw
