"""A cache of image features, keyed by the content of the image."""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from ..cache.paged_tensors import outside_inference_mode
from ..lock import DeferringLock

MAX_IMAGES = 64


def image_hash(image: Tensor) -> bytes:
    """Hash the pixels [c, H, W], their dtype and shape."""
    header = f"{image.dtype} {list(image.shape)}".encode()
    return blake2b(header + image.contiguous().view(torch.uint8).cpu().numpy().tobytes(), digest_size=16).digest()


def image_token_key(digest: bytes, position: int) -> int:
    """The prefix-cache key of one position of an image: a number below 0, which no token id is."""
    return -1 - int.from_bytes(blake2b(digest + position.to_bytes(4), digest_size=16).digest())


class ImageFeatureCache:
    """Keeps the features of the `max_images` most recently used images on the model's device. Threads take turns.

    encode: images [n, c, H, W] -> features [n, tokens, e]. Make a new cache when its parameters change.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], max_images: int = MAX_IMAGES):
        self.encode = encode
        self.max_images = max_images
        self.features: dict[bytes, Tensor] = {}  # [tokens, e] each, least recently used first
        self.lock = DeferringLock()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, list[int]]:
        """Encode images [n, c, H, W] -> features [n, tokens, e], and the key of each of the n·tokens positions."""
        hashes = [image_hash(image) for image in pixels]
        with self.lock, outside_inference_mode():
            new = {key: image for key, image in zip(hashes, pixels) if key not in self.features}
            if new:
                self.features |= zip(new, map(torch.clone, self.encode(torch.stack([*new.values()]))))
            self.features |= {key: self.features.pop(key) for key in dict.fromkeys(hashes)}
            features = torch.stack([self.features[key] for key in hashes])
            for key in [*self.features][: -self.max_images]:
                del self.features[key]
        return features, [image_token_key(key, i) for key in hashes for i in range(features.shape[1])]
