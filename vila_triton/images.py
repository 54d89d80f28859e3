"""Pictures on disk to what the vision tower takes, through transformers' image processors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


class ImageError(ValueError):
    """A picture cannot be read."""


def open_image(path: Path | str) -> Image.Image:
    """The picture, upright (EXIF) and in RGB. Errors: `ImageError` naming the file."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be read as a picture: {error}") from None


def image_processor(folder: Path) -> Any:
    """The image processor of a VILA folder, in its PIL version."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder / "vision_tower", backend="pil")


def pixels(images: Sequence[Image.Image], processor: Any, mode: str | None) -> Tensor:
    """Pictures to [n, 3, H, W] float32. Mode "resize" stretches them to the tower's size first, None leaves that to
    the processor. Errors: ValueError for another mode.
    """
    if mode not in (None, "resize"):
        raise ValueError(f"image_aspect_ratio {mode!r} is not supported ('resize' and null are)")
    if mode == "resize":
        size = processor.size
        images = [image.resize((size["width"], size["height"])) for image in images]
    values = processor(list(images), return_tensors="pt")["pixel_values"]
    return values if isinstance(values, Tensor) else torch.stack(list(values))
