"""Images and videos to what the vision tower takes, through transformers' image processors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..checkpoints.loading import read_configs
from ..files.reading import LoadError, read_json, require_file, require_own
from ..models.config import VisionConfig
from .preprocessor_config import settings

FILE = "preprocessor_config.json"
MODES = ("resize", "pad", "square", None)
MOST_FRAMES = 1024
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # formats whose further pictures are meant to be seen, one after another
ORIENTATION = 0x0112  # EXIF's tag
TILE = 1024  # pixels a side: what a picture is coloured in, so that copies of it are not held
IN_PILLOW = {"CLIP": "CLIPImageProcessorPil", "Siglip": "SiglipImageProcessorPil"}  # by how their names in files begin


Images = Image.Image | str | Path | Sequence[Any] | None


class ImageError(ValueError):
    """A picture or a video cannot be read, or cannot be made to fit."""


def rgb(image: Image.Image) -> Image.Image:
    """The picture upright (EXIF) and in 8-bit RGB, as a viewer shows it.

    Transparency lies on white. 16-bit greys are scaled to 8 bits, by 257, as 65535 is the white of the format.
    Errors: `ImageError` for numbers without a known white, and for a picture without pixels.
    """
    if not image.width or not image.height:
        raise ImageError(f"it has {image.width} x {image.height} pixels")
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    found = Image.new("RGB", image.size)
    for top, left in product(range(0, image.height, TILE), range(0, image.width, TILE)):
        box = left, top, min(left + TILE, image.width), min(top + TILE, image.height)
        found.paste(coloured(image.crop(box)), box)
    return found


def coloured(image: Image.Image) -> Image.Image:
    """A picture, or a tile of one, in RGB. Errors: `ImageError`."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageError(f"its numbers (mode {image.mode}) have no known white; scale them to 0 to 255 first")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@contextmanager
def opened(path: Path | str, kind: str) -> Iterator[Image.Image]:
    """A file as Pillow opens it. Errors: `ImageError` naming the file, for whatever is wrong with it."""
    try:
        require_file(Path(path))
        with Image.open(path) as image:
            if (limit := Image.MAX_IMAGE_PIXELS) and image.width * image.height > limit:  # Pillow only warns
                raise ImageError(f"it has {image.width} x {image.height} pixels, more than {limit}; make it smaller")
            yield image
    except LoadError as error:
        raise ImageError(str(error)) from None
    except Exception as error:  # a broken file fails in Pillow's decoders as OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{path} cannot be read as a {kind}: {error}") from None


def open_image(path: Path | str) -> Image.Image:
    """The picture as `rgb` has it. Errors: `ImageError` naming the file."""
    with opened(path, "picture") as image:
        if (count := getattr(image, "n_frames", 1)) > 1 and image.format in ANIMATED:
            raise ImageError(f"it is animated ({count} frames); give it as a video, or one frame of it")
        return rgb(image)


def frames(video: Path | str | Sequence[Image.Image], n: int) -> list[Image.Image]:
    """n frames of an animated file (GIF, WebP, APNG), or of a list of pictures in order of time, evenly spread.

    As VILA was trained: of `count` frames those at linspace(0, count - 2, n), rounded down; the last frame is never
    asked for, as films often hold one less than they say. A video shorter than n comes whole, after black frames of its
    size, so that what stands next to the question are real frames. A video of just n comes whole too; upstream fails
    on it, as its n places are only n - 1 different ones.
    Errors: `ImageError` naming the file; ValueError for n < 1 or beyond `MOST_FRAMES`, or an empty list.
    """
    if n < 1:
        raise ValueError(f"a video is seen in at least 1 frame, not {n}")
    if n > MOST_FRAMES:
        raise ValueError(f"a video is seen in at most {MOST_FRAMES} frames, not {n}")
    if isinstance(video, (Path, str)):
        with opened(video, "video (an animated GIF, WebP or PNG)") as image:
            first = int(getattr(image, "default_image", False))  # of an APNG: shown only where nothing moves
            count = getattr(image, "n_frames", 1) - first
            if count < 2:
                raise ImageError("it is one picture; give it as such")
            seen, limit = [], Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height * min(count, n) > limit:
                raise ImageError(
                    f"{min(count, n)} frames of {image.width} x {image.height} are more than {limit} pixels; "
                    "make it smaller, or look at fewer frames"
                )
            for i in moments(count, n):
                image.seek(first + i)
                seen.append(rgb(image))
    elif video:
        seen = [rgb(video[i]) for i in moments(len(video), n)]
    else:
        raise ValueError("a video of no frames")
    return [Image.new("RGB", seen[-1].size)] * (n - len(seen)) + seen


def moments(count: int, n: int) -> list[int]:
    """Which of `count` frames are seen, n of them or all."""
    return list(range(count)) if count <= n else [int(i) for i in np.linspace(0, count - 2, n)]


def image_processor(folder: Path, tower: VisionConfig | None = None) -> Any:
    """The image processor of a VILA folder, in its PIL version, made to give pictures of the size the tower takes.

    That size is the largest scale of S2, `vision_resolution`, or the tower's own. What stands in no file is as the
    tower was trained; so is all of InternViT's, whose file names a class that only VILA has. `tower` is read from the
    folder's configs if not given; a folder without them, as processors are saved alone, has its sizes in its file.
    Errors: `ImageError` for a file that transformers makes nothing of; `LoadError`, `ConfigError` for wrong configs.
    """
    folder = Path(folder)
    require_own(folder, *(place for place in (folder, folder / "vision_tower") if place.is_dir()))
    if tower is None and (folder / "config.json").exists():
        top, parts = read_configs(folder)
        tower = VisionConfig.from_dict(parts["vision_tower"], top)
    places = [x for x in (folder / "vision_tower", folder) if (x / FILE).exists()]
    if tower is not None and (not places or tower.model_type == "intern_vit_6b"):
        return fitted(as_trained(tower), tower.input_size)
    if not places:
        raise ImageError(f"{folder} has neither a config.json nor a {FILE}")
    file = places[0] / FILE
    try:
        values = read_json(file)
        processor = in_pillow(kind_in(values), settings(values))
    except (OSError, ValueError) as error:
        raise ImageError(f"{file} is no image processor: {error}") from None
    return fitted(processor, tower.input_size) if tower else processor


def kind_in(values: Mapping[str, Any]) -> str:
    """The kind of processor that a file names, as old and new versions of transformers write it.

    Errors: ValueError for a name that is none of `IN_PILLOW`.
    """
    name = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
    kind = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    if kind not in IN_PILLOW:
        raise ValueError(
            f"image_processor_type is {name[:60]}, expected {' or '.join(f'{x}ImageProcessor' for x in IN_PILLOW)}"
        )
    return kind


def in_pillow(kind: str, values: Mapping[str, Any]) -> Any:
    """transformers' image processor of a kind that needs Pillow alone.

    Taken by name: `AutoImageProcessor` of transformers 5.17 wants torchvision even for it, and that of any version asks
    whether it may run code that a file names.
    """
    import transformers

    return getattr(transformers, IN_PILLOW[kind])(**values)


def as_trained(tower: VisionConfig) -> Any:
    """The image processor that a kind of tower was trained with."""
    from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    if tower.model_type == "intern_vit_6b":
        return in_pillow("Siglip", {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD})
    return in_pillow("CLIP" if tower.model_type == "clip_vision_model" else "Siglip", {})


def fitted(processor: Any, side: int) -> Any:
    """The processor, set to give squares of a side."""
    square = {"height": side, "width": side}
    processor.size = {"shortest_edge": side} if processor.size.get("shortest_edge") else square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square
    return processor


def pixels(images: Sequence[Image.Image], processor: Any, mode: str | None) -> Tensor:
    """Images to [n, 3, H, W] float32.

    Mode "resize" stretches them to the tower's size first (bicubic), "pad" puts them in the middle of a square of the
    processor's mean colour; "square" (LLaVA's word) and None leave all to the processor: SigLIP and InternViT stretch,
    CLIP scales the shorter side and cuts out the middle.
    Errors: ValueError for another mode; `ImageError` for pictures that would grow beyond Pillow's limit of pixels, or
    come out in different sizes.
    """
    if mode not in MODES:
        raise ValueError(f"image_aspect_ratio {mode!r} is not supported ('resize', 'pad', 'square' and null are)")
    pictures = [rgb(image) for image in images]
    if mode == "resize":
        size = getattr(processor, "crop_size", None) or processor.size
        if "width" not in size:
            raise ImageError(f"image_aspect_ratio 'resize' needs a height and a width, and size in {FILE} is {size}")
        pictures = [image.resize((size["width"], size["height"]), Image.Resampling.BICUBIC) for image in pictures]
    elif mode == "pad":
        colour = tuple(int(255 * x) for x in processor.image_mean)
        pictures = [expand2square(image, colour) for image in pictures]
    elif short := processor.size.get("shortest_edge"):
        for image in pictures:
            limited(image, short, short * max(image.size) // min(image.size))
    values = [torch.as_tensor(x) for x in processor(pictures)["pixel_values"]]
    if len(sizes := {tuple(x.shape) for x in values}) > 1:
        raise ImageError(f"the image processor makes pictures of different sizes: {', '.join(map(str, sorted(sizes)))}")
    return torch.stack(values)


def expand2square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of the smallest square of a colour; an odd rest is below or to the right."""
    side = max(image.size)
    limited(image, side, side)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def limited(image: Image.Image, width: int, height: int) -> None:
    """Errors: `ImageError` if so many pixels are more than Pillow would read from a file."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ImageError(
            f"a picture of {image.width} x {image.height} would grow to {width * height} pixels, beyond {limit}; "
            f"cut it, or use image_aspect_ratio 'resize'"
        )


def listed(images: Images) -> list[Any]:
    """Images as a list, of one picture too. Errors: TypeError for what is none."""
    if isinstance(images, (Image.Image, str, Path)):
        return [images]
    if images is not None and not isinstance(images, (list, tuple)):
        raise TypeError(f"pictures are PIL images or paths of files, or a list of them, not {type(images).__name__}")
    return list(images or ())


def loaded(picture: Any) -> Image.Image:
    """A picture, or that of a file. Errors: `ImageError` for a file, TypeError for anything else."""
    if isinstance(picture, (str, Path)):
        return open_image(picture)
    if not isinstance(picture, Image.Image):
        raise TypeError(f"a picture is a PIL image or the path of a file, not {type(picture).__name__}")
    return picture
