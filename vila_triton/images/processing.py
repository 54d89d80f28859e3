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
from ..files.reading import LoadError, read_json, require_contained, require_file
from ..models.config import VisionConfig
from .preprocessor_config import image_processor_arguments

PREPROCESSOR_CONFIG_NAME = "preprocessor_config.json"
ASPECT_RATIO_MODES = ("resize", "pad", "square", None)
MAX_FRAMES = 1024
ANIMATED_FORMATS = (
    "GIF",
    "WEBP",
    "PNG",
    "AVIF",
)  # formats whose further pictures are meant to be seen, one after another
EXIF_ORIENTATION = 0x0112  # EXIF's tag
TILE_SIZE = 1024  # pixels a side: what a picture is coloured in, so that copies of it are not held
PIL_PROCESSORS = {
    "CLIP": "CLIPImageProcessorPil",
    "Siglip": "SiglipImageProcessorPil",
}  # by how their names in files begin


ImageInput = Image.Image | str | Path | Sequence[Any] | None


class ImageError(ValueError):
    """A picture or a video cannot be read, or cannot be made to fit."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture upright (EXIF) and in 8-bit RGB, as a viewer shows it.

    Transparency lies on white. 16-bit greys are scaled to 8 bits, by 257, as 65535 is the white of the format.
    Errors: `ImageError` for numbers without a known white, and for a picture without pixels.
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
def open_media(path: Path | str, description: str) -> Iterator[Image.Image]:
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
        raise ImageError(f"{path} cannot be read as a {description}: {error}") from None


def open_image(path: Path | str) -> Image.Image:
    """The picture as `rgb` has it. Errors: `ImageError` naming the file."""
    with open_media(path, "picture") as image:
        if (count := getattr(image, "n_frames", 1)) > 1 and image.format in ANIMATED_FORMATS:
            raise ImageError(f"it is animated ({count} frames); give it as a video, or one frame of it")
        return to_rgb(image)


def load_video_frames(video: Path | str | Sequence[Image.Image], num_frames: int) -> list[Image.Image]:
    """n frames of an animated file (GIF, WebP, APNG), or of a list of pictures in order of time, evenly spread.

    As VILA was trained: of `count` frames those at linspace(0, count - 2, n), rounded down; the last frame is never
    asked for, as films often hold one less than they say. A video shorter than n comes whole, after black frames of its
    size, so that what stands next to the question are real frames. A video of just n comes whole too; upstream fails
    on it, as its n places are only n - 1 different ones.
    Errors: `ImageError` naming the file; ValueError for n < 1 or beyond `MOST_FRAMES`, or an empty list.
    """
    if num_frames < 1:
        raise ValueError(f"a video is seen in at least 1 frame, not {num_frames}")
    if num_frames > MAX_FRAMES:
        raise ValueError(f"a video is seen in at most {MAX_FRAMES} frames, not {num_frames}")
    if isinstance(video, (Path, str)):
        with open_media(video, "video (an animated GIF, WebP or PNG)") as image:
            first_frame = int(getattr(image, "default_image", False))  # of an APNG: shown only where nothing moves
            count = getattr(image, "n_frames", 1) - first_frame
            if count < 2:
                raise ImageError("it is one picture; give it as such")
            selected, limit = [], Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height * min(count, num_frames) > limit:
                raise ImageError(
                    f"{min(count, num_frames)} frames of {image.width} x {image.height} are more than {limit} pixels; "
                    "make it smaller, or look at fewer frames"
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
    """Which of `count` frames are seen, n of them or all."""
    return list(range(count)) if count <= num_frames else [int(i) for i in np.linspace(0, count - 2, num_frames)]


def load_image_processor(folder: Path, tower: VisionConfig | None = None) -> Any:
    """The image processor of a VILA folder, in its PIL version, made to give pictures of the size the tower takes.

    That size is the largest scale of S2, `vision_resolution`, or the tower's own. What stands in no file is as the
    tower was trained; so is all of InternViT's, whose file names a class that only VILA has. `tower` is read from the
    folder's configs if not given; a folder without them, as processors are saved alone, has its sizes in its file.
    Errors: `ImageError` for a file that transformers makes nothing of; `LoadError`, `ConfigError` for wrong configs.
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
    """The kind of processor that a file names, as old and new versions of transformers write it.

    Errors: ValueError for a name that is none of `IN_PILLOW`.
    """
    name = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
    family = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    if family not in PIL_PROCESSORS:
        raise ValueError(
            f"image_processor_type is {name[:60]}, expected {' or '.join(f'{x}ImageProcessor' for x in PIL_PROCESSORS)}"
        )
    return family


def pil_image_processor(family: str, values: Mapping[str, Any]) -> Any:
    """transformers' image processor of a kind that needs Pillow alone.

    Taken by name: `AutoImageProcessor` of transformers 5.17 wants torchvision even for it, and that of any version asks
    whether it may run code that a file names.
    """
    import transformers

    return getattr(transformers, PIL_PROCESSORS[family])(**values)


def default_image_processor(tower: VisionConfig) -> Any:
    """The image processor that a kind of tower was trained with."""
    from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    if tower.model_type == "intern_vit_6b":
        return pil_image_processor("Siglip", {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD})
    return pil_image_processor("CLIP" if tower.model_type == "clip_vision_model" else "Siglip", {})


def set_input_size(processor: Any, size: int) -> Any:
    """The processor, set to give squares of a side."""
    square = {"height": size, "width": size}
    processor.size = {"shortest_edge": size} if processor.size.get("shortest_edge") else square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square
    return processor


def preprocess_images(images: Sequence[Image.Image], processor: Any, mode: str | None) -> Tensor:
    """Images to [n, 3, H, W] float32.

    Mode "resize" stretches them to the tower's size first (bicubic), "pad" puts them in the middle of a square of the
    processor's mean colour; "square" (LLaVA's word) and None leave all to the processor: SigLIP and InternViT stretch,
    CLIP scales the shorter side and cuts out the middle.
    Errors: ValueError for another mode; `ImageError` for pictures that would grow beyond Pillow's limit of pixels, or
    come out in different sizes.
    """
    if mode not in ASPECT_RATIO_MODES:
        raise ValueError(f"image_aspect_ratio {mode!r} is not supported ('resize', 'pad', 'square' and null are)")
    rgb_images = [to_rgb(image) for image in images]
    if mode == "resize":
        size = getattr(processor, "crop_size", None) or processor.size
        if "width" not in size:
            raise ImageError(
                f"image_aspect_ratio 'resize' needs a height and a width, and size in {PREPROCESSOR_CONFIG_NAME} is {size}"
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
        raise ImageError(f"the image processor makes pictures of different sizes: {', '.join(map(str, sorted(sizes)))}")
    return torch.stack(values)


def expand2square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of the smallest square of a colour; an odd rest is below or to the right."""
    side = max(image.size)
    check_pixel_limit(image, side, side)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def check_pixel_limit(image: Image.Image, width: int, height: int) -> None:
    """Errors: `ImageError` if so many pixels are more than Pillow would read from a file."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ImageError(
            f"a picture of {image.width} x {image.height} would grow to {width * height} pixels, beyond {limit}; "
            f"cut it, or use image_aspect_ratio 'resize'"
        )


def list_images(images: ImageInput) -> list[Any]:
    """Images as a list, of one picture too. Errors: TypeError for what is none."""
    if isinstance(images, (Image.Image, str, Path)):
        return [images]
    if images is not None and not isinstance(images, (list, tuple)):
        raise TypeError(f"pictures are PIL images or paths of files, or a list of them, not {type(images).__name__}")
    return list(images or ())


def load_image(image: Any) -> Image.Image:
    """A picture, or that of a file. Errors: `ImageError` for a file, TypeError for anything else."""
    if isinstance(image, (str, Path)):
        return open_image(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"a picture is a PIL image or the path of a file, not {type(image).__name__}")
    return image
