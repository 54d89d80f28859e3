"""Images of requests: opened as everywhere in this project, and fetched from nowhere unless the operator allows it.

vLLM takes it by `VLLM_MEDIA_CONNECTOR=vila_triton`, which `vila-triton serve` sets. An image comes as a `data:` URL.
Web addresses need `--allowed-media-domains`, files of the server `--allowed-local-media-path`, both options of vLLM.
"""

import base64
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaIO, MediaWithBytes

from ..images.processing import decode_image


class ImageIO(MediaIO[Image.Image]):
    """Encoded images to RGB. Errors: `ImageError`, also for more pixels than vLLM's own limit, since all images of a
    request are in memory at once; ValueError for what is not base64.
    """

    def load_bytes(self, data: bytes) -> Any:
        return MediaWithBytes(decode_image(data, ALLOWED_IMAGE_FORMATS, envs.VLLM_MAX_IMAGE_PIXELS), data)

    def load_base64(self, media_type: str, data: str) -> Any:
        return self.load_bytes(base64.b64decode(data, validate=True))

    def load_file(self, filepath: Path) -> Any:
        return self.load_bytes(filepath.read_bytes())


@MEDIA_CONNECTOR_REGISTRY.register("vila_triton")
class ImageSource(MediaConnector):
    """The places that images come from. Every error is a `VLLMValidationError`, which is answered by status 400."""

    def load_from_url(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        self.require_allowed(url)
        try:
            return super().load_from_url(url, media_io, **kwargs)
        except Exception as error:
            raise image_error(error) from error

    async def load_from_url_async(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        self.require_allowed(url)
        try:
            return await super().load_from_url_async(url, media_io, **kwargs)
        except Exception as error:  # of the network, of the operating system, of what was read
            raise image_error(error) from error

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        return self.load_from_url(image_url, ImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        return await self.load_from_url_async(image_url, ImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    def require_allowed(self, url: str) -> None:
        """Raise `VLLMValidationError` for a URL that the operator does not allow, whatever is behind it."""
        scheme = url.partition(":")[0].lower()
        allowed = {"data": True, "file": self.allowed_local_media_path, "http": self.allowed_media_domains}
        allowed["https"] = allowed["http"]
        if not allowed.get(scheme):
            raise image_error(
                f"URLs of the kind {scheme[:10]!r} are not allowed here; send the image itself, as "
                "data:image/...;base64,..."
            )


def image_error(reason: Exception | str) -> VLLMValidationError:
    """The error of a request with an image that cannot be had."""
    text = str(reason) or type(reason).__name__
    return VLLMValidationError(f"The image cannot be read: {text}", parameter="image_url")
