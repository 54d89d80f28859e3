"""Pictures known by content: the names of their positions, and their features, computed once."""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from ..cache.paged_cache import lasting
from ..lock import Lock

LIMIT = 64


def fingerprint(picture: Tensor) -> bytes:
    """A digest of the pixels [c, H, W], their dtype and their shape."""
    about = f"{picture.dtype} {list(picture.shape)}".encode()
    return blake2b(about + picture.contiguous().view(torch.uint8).cpu().numpy().tobytes(), digest_size=16).digest()


def name(picture: bytes, position: int) -> int:
    """What a position of a picture with this fingerprint is known by: a number below 0, which no word has."""
    return -1 - int.from_bytes(blake2b(picture + position.to_bytes(4), digest_size=16).digest())


class Pictures:
    """Features of pictures, of which the `limit` most recently asked for are kept on the model's device; threads take
    turns.

    encode: pictures [n, c, H, W] -> features [n, tokens, e]. What is kept is wrong once its parameters change.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], limit: int = LIMIT):
        self.encode = encode
        self.limit = limit
        self.kept: dict[bytes, Tensor] = {}  # [tokens, e] each, the least recently asked for first
        self.lock = Lock()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, list[int]]:
        """Pictures [n, c, H, W] -> features [n, tokens, e], and the name of each of the n·tokens positions."""
        prints = [fingerprint(picture) for picture in pixels]
        with self.lock, lasting():
            new = {key: picture for key, picture in zip(prints, pixels) if key not in self.kept}
            if new:
                self.kept |= zip(new, map(torch.clone, self.encode(torch.stack([*new.values()]))))
            self.kept |= {key: self.kept.pop(key) for key in dict.fromkeys(prints)}
            features = torch.stack([self.kept[key] for key in prints])
            for key in [*self.kept][: -self.limit]:
                del self.kept[key]
        return features, [name(key, i) for key in prints for i in range(features.shape[1])]
