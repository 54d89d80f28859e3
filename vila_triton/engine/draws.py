"""Random numbers by counter: each is a function of a seed and of how many were drawn before it, and of nothing else.

They are the splitmix64 sequence of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), with
Stafford's mix 13: seed and index are multiplied by two odd constants, added, and mixed. Integers only, so bits are the
same on every device and in every batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """The number of 64 bits with the bits of x."""
    return (x + 2**63) % 2**64 - 2**63


INDEX_STEP = _signed(0x9E3779B97F4A7C15)
SEED_STEP = _signed(0xD1342543DE82EF95)
MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
LAST_SHIFT = 31
FLOAT_BITS = 53  # of a float64's significand


def seed_tensor(seeds: Sequence[int], device: torch.device | str) -> Tensor:
    """Seeds as int64 [b]; those from 2^63 on wrap around."""
    return torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device)


def random_bits(seeds: Tensor, index: Tensor) -> Tensor:
    """64 random bits for each seed [b] int64 and index [b] int64, from 0 on -> [b] int64."""
    x = seeds * SEED_STEP + (index + 1) * INDEX_STEP  # products wrap around
    for shift, factor in MIX:
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, LAST_SHIFT)


def uniform(seeds: Tensor, index: Tensor) -> Tensor:
    """A number in [0, 1) for each seed [b] int64 and index [b] int64 -> [b] float64, a multiple of 2^-53."""
    return _shift_right(random_bits(seeds, index), 64 - FLOAT_BITS).double() * 2.0**-FLOAT_BITS


def _shift_right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & (2 ** (64 - n) - 1)  # zeros come in, not the sign
