"""Image and video files to pixel tensors for the vision tower, through transformers' image processors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..checkpoints.loading import read_configs
from ..files.reading import LoadError, read_json, require_contained, require_file
from ..models.config import VisionConfig
from .preprocessor_config import image_processor_arguments

PREPROCESSOR_CONFIG_NAME = "preprocessor_config.json"
ASPECT_RATIO_MODES = ("resize", "pad", "square", None)
MAX_FRAMES = 1024
ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")  # others may hold several images that are no video
EXIF_ORIENTATION = 0x0112
TILE_SIZE = 1024  # pixels per side of the tiles in which images are converted
PIL_PROCESSORS = {"CLIP": "CLIPImageProcessorPil", "Siglip": "SiglipImageProcessorPil"}  # by prefix of their names


ImageInput = Image.Image | str | Path | Sequence[Any] | None


class ImageError(ValueError):
    """An image or a video cannot be read, or cannot be resized as asked."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB as a viewer shows it: upright (EXIF), transparency on white.

    16-bit greys are divided by 257, as their white is 65535. Images are converted in tiles, so that no full-size
    intermediate copies exist.
    Errors: `ImageError` for pixel values without a known white, and for an image without pixels.
    """
    if not image.width or not image.height:
        raise ImageError(f"it has {image.width} x {image.height} pixels")
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    result = Image.new("RGB", image.size)
    for top, left in product(range(0, image.height, TILE_SIZE), range(0, image.width, TILE_SIZE)):
        box = left, top, min(left + TILE_SIZE, image.width), min(top + TILE_SIZE, image.height)
        result.paste(tile_to_rgb(image.crop(box)), box)
    return result


def tile_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image, or a tile of one, to RGB. Errors: `ImageError`."""
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
def open_media(path: Path | str, description: str) -> Iterator[Image.Image]:
    """Open a file with Pillow. Errors: `ImageError` naming the file, for whatever is wrong with it."""
    try:
        require_file(Path(path))
        with Image.open(path) as image:
            require_size(image)
            yield image
    except LoadError as error:
        raise ImageError(str(error)) from None
    except Exception as error:  # a broken file fails in Pillow's decoders as OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{path} cannot be read as {description}: {error}") from None


def open_image(path: Path | str) -> Image.Image:
    """Open an image as RGB. Errors: `ImageError` naming the file."""
    with open_media(path, "an image") as image:
        return still_to_rgb(image)


def decode_image(data: bytes, formats: tuple[str, ...] | None = None, max_pixels: int | None = None) -> Image.Image:
    """Decode the bytes of an image file as RGB, if it is in one of Pillow's formats (None: in any).

    max_pixels: a limit below `MAX_IMAGE_PIXELS`. Errors: `ImageError`, for whatever is wrong with them.
    """
    try:
        with Image.open(BytesIO(data), formats=formats) as image:
            require_size(image, max_pixels)
            return still_to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError:  # whose message shows an address in memory
        raise ImageError(f"{len(data)} bytes that are no image file") from None
    except Exception as error:
        raise ImageError(f"it cannot be read as an image: {error}") from None


def require_size(image: Image.Image, max_pixels: int | None = None) -> None:
    """Raise `ImageError` for more pixels than `max_pixels` or `MAX_IMAGE_PIXELS`, about which Pillow only warns."""
    limits = [limit for limit in (max_pixels, Image.MAX_IMAGE_PIXELS) if limit]
    if limits and image.width * image.height > (limit := min(limits)):
        raise ImageError(f"it has {image.width} x {image.height} pixels, more than {limit}; make it smaller")


def still_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an open file to RGB. Errors: `ImageError` for an animation too."""
    if (count := getattr(image, "n_frames", 1)) > 1 and image.format in ANIMATED_FORMATS:
        raise ImageError(f"it is animated ({count} frames); pass it as a video, or one frame of it")
    return to_rgb(image)


def load_video_frames(video: Path | str | Sequence[Image.Image], num_frames: int) -> list[Image.Image]:
    """Load evenly spaced frames of a video: an animated file (GIF, WebP, APNG), or a list of images in order of time.

    As in VILA's training, the frames are those at linspace(0, count - 2, num_frames), rounded down; the last one is
    left out, as files often hold one frame less than they declare. A video of `num_frames` or fewer is returned whole,
    a shorter one behind black frames of its size, so that the real frames stand next to the question. (Upstream fails
    on a video of just `num_frames`.)
    Errors: `ImageError` naming the file; ValueError for fewer than 1 or more than `MAX_FRAMES` frames, or an empty
    list.
    """
    if num_frames < 1:
        raise ValueError(f"a video needs at least 1 frame, not {num_frames}")
    if num_frames > MAX_FRAMES:
        raise ValueError(f"a video has at most {MAX_FRAMES} frames, not {num_frames}")
    if isinstance(video, (Path, str)):
        with open_media(video, "a video (an animated GIF, WebP or PNG)") as image:
            first_frame = int(getattr(image, "default_image", False))  # of an APNG: not a part of the animation
            count = getattr(image, "n_frames", 1) - first_frame
            if count < 2:
                raise ImageError("it is one image; pass it as such")
            selected, limit = [], Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height * min(count, num_frames) > limit:
                raise ImageError(
                    f"{min(count, num_frames)} frames of {image.width} x {image.height} are more than {limit} pixels; "
                    "make it smaller, or take fewer frames"
                )
            for i in sample_frame_indices(count, num_frames):
                image.seek(first_frame + i)
                selected.append(to_rgb(image))
    elif video:
        selected = [to_rgb(video[i]) for i in sample_frame_indices(len(video), num_frames)]
    else:
        raise ValueError("a video of no frames")
    return [Image.new("RGB", selected[-1].size)] * (num_frames - len(selected)) + selected


def sample_frame_indices(count: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` evenly spaced frames of `count`, or of all if there are no more."""
    return list(range(count)) if count <= num_frames else [int(i) for i in np.linspace(0, count - 2, num_frames)]


def load_image_processor(folder: Path, tower: VisionConfig | None = None) -> Any:
    """Load the image processor of a VILA folder in its PIL version, set to the image size of the tower.

    That size is the largest S2 scale, `vision_resolution`, or the trained size. Fields that are in no file are as the
    tower was trained; so are all of InternViT, whose file names a class that only VILA has. `tower` is read from the
    folder's configs if it is None; a folder without configs, as processors alone are saved, has the size in its file.
    Errors: `ImageError` for a file that is no image processor; `LoadError`, `ConfigError` for wrong configs.
    """
    folder = Path(folder)
    require_contained(folder, *(path for path in (folder, folder / "vision_tower") if path.is_dir()))
    if tower is None and (folder / "config.json").exists():
        top, parts = read_configs(folder)
        tower = VisionConfig.from_dict(parts["vision_tower"], top)
    folders = [x for x in (folder / "vision_tower", folder) if (x / PREPROCESSOR_CONFIG_NAME).exists()]
    if tower is not None and (not folders or tower.model_type == "intern_vit_6b"):
        return set_input_size(default_image_processor(tower), tower.input_size)
    if not folders:
        raise ImageError(f"{folder} has neither a config.json nor a {PREPROCESSOR_CONFIG_NAME}")
    file = folders[0] / PREPROCESSOR_CONFIG_NAME
    try:
        values = read_json(file)
        processor = pil_image_processor(processor_family(values), image_processor_arguments(values))
    except (OSError, ValueError) as error:
        raise ImageError(f"{file} is no image processor: {error}") from None
    return set_input_size(processor, tower.input_size) if tower else processor


def processor_family(values: Mapping[str, Any]) -> str:
    """The family, a key of `PIL_PROCESSORS`, of the processor class that a file names in either version's spelling.
    Errors: ValueError.
    """
    name = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
    family = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    if family not in PIL_PROCESSORS:
        raise ValueError(
            f"image_processor_type is {name[:60]}, expected {' or '.join(f'{x}ImageProcessor' for x in PIL_PROCESSORS)}"
        )
    return family


def pil_image_processor(family: str, values: Mapping[str, Any]) -> Any:
    """Make transformers' image processor of a family, in the version that needs Pillow alone.

    It is taken by name: `AutoImageProcessor` of transformers 5.17 requires torchvision even for it, and any version's
    may ask to run code that a file names.
    """
    import transformers

    return getattr(transformers, PIL_PROCESSORS[family])(**values)


def default_image_processor(tower: VisionConfig) -> Any:
    """The image processor that a tower was trained with."""
    from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    if tower.model_type == "intern_vit_6b":
        return pil_image_processor("Siglip", {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD})
    return pil_image_processor("CLIP" if tower.model_type == "clip_vision_model" else "Siglip", {})


def set_input_size(processor: Any, size: int) -> Any:
    """Set a processor to produce squares of a side in pixels; returns it."""
    square = {"height": size, "width": size}
    processor.size = {"shortest_edge": size} if processor.size.get("shortest_edge") else square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square
    return processor


def preprocess_images(images: Sequence[Image.Image], processor: Any, mode: str | None) -> Tensor:
    """Preprocess images for the tower -> [n, 3, H, W] float32.

    mode: "resize" stretches images to the tower's size first (bicubic); "pad" centers them in a square of the
    processor's mean color; "square" (LLaVA's word) and None leave all to the processor: those of SigLIP and InternViT
    stretch, CLIP's scales the shorter side and crops the center.
    Errors: ValueError for another mode; `ImageError` for images that would grow beyond Pillow's limit of pixels or come
    out in different sizes.
    """
    if mode not in ASPECT_RATIO_MODES:
        raise ValueError(f"image_aspect_ratio {mode!r} is not supported ('resize', 'pad', 'square' and null are)")
    rgb_images = [to_rgb(image) for image in images]
    if mode == "resize":
        size = getattr(processor, "crop_size", None) or processor.size
        if "width" not in size:
            raise ImageError(
                f"image_aspect_ratio 'resize' needs a height and a width, and size in {PREPROCESSOR_CONFIG_NAME} is "
                f"{size}"
            )
        rgb_images = [image.resize((size["width"], size["height"]), Image.Resampling.BICUBIC) for image in rgb_images]
    elif mode == "pad":
        color = tuple(int(255 * x) for x in processor.image_mean)
        rgb_images = [expand2square(image, color) for image in rgb_images]
    elif shortest_edge := processor.size.get("shortest_edge"):
        for image in rgb_images:
            check_pixel_limit(image, shortest_edge, shortest_edge * max(image.size) // min(image.size))
    values = [torch.as_tensor(x) for x in processor(rgb_images)["pixel_values"]]
    if len(sizes := {tuple(x.shape) for x in values}) > 1:
        raise ImageError(f"the image processor makes images of different sizes: {', '.join(map(str, sorted(sizes)))}")
    return torch.stack(values)


def expand2square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Center an image in the smallest square of a color; an odd pixel goes below or to the right."""
    side = max(image.size)
    check_pixel_limit(image, side, side)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def check_pixel_limit(image: Image.Image, width: int, height: int) -> None:
    """Errors: `ImageError` if width x height is more than Pillow would read from a file."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ImageError(
            f"an image of {image.width} x {image.height} would grow to {width * height} pixels, beyond {limit}; "
            f"cut it, or use image_aspect_ratio 'resize'"
        )


def list_images(images: ImageInput) -> list[Any]:
    """Images as a list. Errors: TypeError for anything but images, paths and lists of them."""
    if isinstance(images, (Image.Image, str, Path)):
        return [images]
    if images is not None and not isinstance(images, (list, tuple)):
        raise TypeError(f"images are PIL images or paths of files, or a list of them, not {type(images).__name__}")
    return list(images or ())


def load_image(image: Any) -> Image.Image:
    """Open a path, or return an image as it is. Errors: `ImageError` for a file, TypeError for anything else."""
    if isinstance(image, (str, Path)):
        return open_image(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image is a PIL image or the path of a file, not {type(image).__name__}")
    return image
