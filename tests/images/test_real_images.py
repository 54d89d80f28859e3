"""The photographs of scikit-image through every image mode and kind of tower."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reference_preprocessing import written_out
from reference_towers import CLIP, INTERN, SIGLIP

from vila_triton.images.processing import (
    ImageError,
    load_image_processor,
    load_video_frames,
    open_image,
    preprocess_images,
)
from vila_triton.models.config import VisionConfig

pytestmark = pytest.mark.real
skimage = pytest.importorskip("skimage", reason="needs the extra `real`")
FOLDER = Path(skimage.__file__).parent / "data"
PICTURES = sorted(x.name for x in FOLDER.iterdir() if x.suffix in (".png", ".jpg"))
SIZES: dict[str, tuple[dict[str, Any], int]] = {"siglip": (SIGLIP, 384), "clip": (CLIP, 336), "intern": (INTERN, 448)}


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    return {name: open_image(FOLDER / name) for name in PICTURES}


def test_there_are_photographs_in_colour_grey_and_with_alpha() -> None:
    modes = {Image.open(FOLDER / name).mode for name in PICTURES}
    assert len(PICTURES) > 20 and {"RGB", "L", "RGBA"} <= modes
    with pytest.raises(ImageError, match=r"multipage_rgb.tif cannot be read as an image"):
        open_image(FOLDER / "multipage_rgb.tif")  # in planes of a kind that Pillow does not know


@pytest.mark.parametrize("mode", ["resize", "pad", "square"])
@pytest.mark.parametrize("tower, side", SIZES.values(), ids=SIZES)
def test_photographs_come_out_as_vila_would_have_them(
    tower: dict, side: int, mode: str, photographs: dict[str, Image.Image]
) -> None:
    cfg = VisionConfig.from_dict({**tower, "image_size": side, "patch_size": 14})
    processor = load_image_processor(Path("nowhere"), cfg)
    for name, picture in photographs.items():
        ours = preprocess_images([picture], processor, mode)[0]
        assert ours.shape == (3, side, side) and ours.isfinite().all(), name
        expected = written_out(picture, cfg.model_type, mode, side)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-5, err_msg=name)


def test_photographs_are_as_scikit_image_reads_them(photographs: dict[str, Image.Image]) -> None:
    io = pytest.importorskip("skimage.io")
    for name in ("astronaut.png", "coffee.png", "chelsea.png", "camera.png", "motorcycle_left.png"):
        theirs = io.imread(FOLDER / name)
        theirs = theirs if theirs.ndim == 3 else np.stack([theirs] * 3, -1)
        assert (np.asarray(photographs[name]) == theirs).all(), name


def test_an_animation_is_seen_frame_by_frame() -> None:
    seen = load_video_frames(FOLDER / "no_time_for_that_tiny.gif", 8)
    assert len(seen) == 8 and len({image.size for image in seen}) == 1
    assert len({image.tobytes() for image in seen}) > 1
