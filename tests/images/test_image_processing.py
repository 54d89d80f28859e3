"""Pixels of every image mode and tower against arithmetic written out, and image processors that fit their tower."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_reference import build, config
from PIL import Image
from reference_preprocessing import written_out
from reference_towers import CLIP, INTERN, SIGLIP
from safetensors.torch import save_file

from vila_triton.images.processing import ImageError, load_image_processor, preprocess_images
from vila_triton.models.config import VisionConfig

CLIP_FILE = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
}
CLIP_OLD = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
SIGLIP_FILE = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}, "resample": 3}
SIGLIP_FILE |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
INTERN_FILE = {"image_processor_type": "InternVisionPreprocessor", "resize_size": 448}
S2 = {"s2": True, "s2_scales": "20,60", "s2_max_split_size": 20}


def folder(tmp_path: Path, tower: dict, file: dict | None, **top: Any) -> Path:
    """Write the files of a VILA folder that concern images, and return the folder."""
    cfg = config(vision=tower, **top).to_dict()
    for name, values in {"": cfg, "llm": cfg["llm_cfg"], "mm_projector": cfg["mm_projector_cfg"]}.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(values, default=str))
    (tmp_path / "vision_tower").mkdir(exist_ok=True)
    (tmp_path / "vision_tower" / "config.json").write_text(json.dumps(tower))
    for name in ("llm", "vision_tower", "mm_projector"):
        save_file({}, tmp_path / name / "model.safetensors")
    for name in ("llm", "vision_tower", "mm_projector"):
        save_file({}, tmp_path / name / "model.safetensors")
    if file is not None:
        (tmp_path / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(file))
    return tmp_path


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


CASES: dict[str, tuple[dict, dict | None, dict, int]] = {
    "siglip": (SIGLIP, SIGLIP_FILE, {}, 20),
    "siglip without a file": (SIGLIP, None, {}, 20),
    "siglip at another resolution": (SIGLIP, SIGLIP_FILE, {"vision_resolution": 28}, 28),
    "siglip s2": (SIGLIP, SIGLIP_FILE, S2, 60),
    "clip": (CLIP, CLIP_FILE, {}, 20),
    "clip as once written": (CLIP, CLIP_OLD, {}, 20),
    "clip without a file": (CLIP, None, {}, 20),
    "clip s2": (CLIP, CLIP_FILE, S2, 60),
    "intern": (INTERN, INTERN_FILE, {}, 20),
    "intern with a file it never reads": (INTERN, CLIP_FILE, {}, 20),
}


@pytest.mark.parametrize("mode", ["resize", "pad", "square", None])
@pytest.mark.parametrize("tower, file, top, side", CASES.values(), ids=CASES)
def test_preprocessed_pixels_equal_vila(
    tower: dict, file: dict | None, top: dict, side: int, mode: str | None, tmp_path: Path
) -> None:
    processor = load_image_processor(folder(tmp_path, tower, file, **top))
    pictures = [noise(47, 33), noise(30, 71, 1), noise(25, 25, 2), noise(9, 64, 3)]
    ours = preprocess_images(pictures, processor, mode)
    assert ours.dtype == torch.float32 and ours.shape == (4, 3, side, side)
    expected = np.stack([written_out(picture, tower["model_type"], mode, side) for picture in pictures])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-5)
    processor.save_pretrained(tmp_path / "alone" / "vision_tower")
    alone = load_image_processor(tmp_path / "alone")  # its sizes are in its file
    assert torch.equal(preprocess_images(pictures, alone, mode), ours)


def test_image_processor_has_the_input_size_of_the_tower() -> None:
    model = build(
        config(vision=CLIP, mm_projector_cfg={"mm_projector_type": "mlp_downsample"}, **S2, mm_hidden_size=48)
    )
    processor = load_image_processor(Path("nowhere"), model.vila_config.vision_tower)
    assert model.encode_images(preprocess_images([noise(33, 21)], processor, None)).shape == (1, 9, 32)


@pytest.mark.parametrize("mode", ["dynamic", "anyres", "Pad", ""])
def test_unknown_image_aspect_ratio_is_refused(mode: str) -> None:
    processor = load_image_processor(Path("nowhere"), VisionConfig.from_dict(SIGLIP))
    with pytest.raises(ValueError, match=f"'{mode}' is not supported .'resize', 'pad', 'square' and null are"):
        preprocess_images([noise(4, 4)], processor, mode)


@pytest.mark.parametrize("mode", ["pad", None])
def test_image_that_would_grow_beyond_the_pixel_limit_is_refused(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    processor = load_image_processor(Path("nowhere"), VisionConfig.from_dict(CLIP))
    with pytest.raises(ImageError, match=r"an image of 3 x 2000 would grow to .* beyond 5000; .*'resize'"):
        preprocess_images([noise(3, 2000)], processor, mode)
    assert preprocess_images([noise(3, 2000)], processor, "resize").shape == (1, 3, 20, 20)


@pytest.mark.parametrize("image", [Image.new("L", (9, 5), 77), Image.new("RGBA", (9, 5)), Image.new("1", (9, 5))])
@pytest.mark.parametrize("mode", ["resize", "pad", None])
def test_preprocessing_of_other_modes_equals_their_rgb_images(image: Image.Image, mode: str | None) -> None:
    """Upstream's "pad" fails on greys that were not opened from a file."""
    processor = load_image_processor(Path("nowhere"), VisionConfig.from_dict(SIGLIP))
    shown = Image.new("RGB", (9, 5), {"L": (77,) * 3, "RGBA": (255,) * 3, "1": (0,) * 3}[image.mode])
    assert torch.equal(preprocess_images([image], processor, mode), preprocess_images([shown], processor, mode))


NAMES = {  # as files of old and new versions of transformers have them
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "CLIPImageProcessorFast": "CLIPImageProcessorPil",
    "CLIPFeatureExtractor": "CLIPImageProcessorPil",
    "SiglipImageProcessor": "SiglipImageProcessorPil",
    "SiglipImageProcessorFast": "SiglipImageProcessorPil",
    "SiglipImageProcessorPil": "SiglipImageProcessorPil",
}


@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
@pytest.mark.parametrize("name, expected", NAMES.items(), ids=NAMES)
def test_image_processor_needs_only_pillow(
    name: str, expected: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is installed: transformers 5.17's Auto class wants torchvision, and may take it where it is."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(vars(sys.modules["transformers"]), "AutoImageProcessor", None)  # setattr would load it first
    code = {"auto_map": {"AutoImageProcessor": "mine.Mine"}}  # which is never looked at
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({key: name, "size": {"height": 9, "width": 9}, **code})
    )
    processor = load_image_processor(tmp_path)
    assert (type(processor).__name__, processor.size["height"]) == (expected, 9)


BROKEN: dict[str, tuple[str | None, str]] = {
    "nothing": (None, "has neither a config.json nor a preprocessor_config.json"),
    "another processor": (
        '{"image_processor_type": "ViTImageProcessor", "auto_map": {"AutoImageProcessor": "mine.Mine"}}',
        "image_processor_type is ViTImageProcessor, expected CLIPImageProcessor or SiglipImageProcessor",
    ),
    "no name": ("{}", "image_processor_type is None, expected CLIP"),
    "a size that is none": ('{"image_processor_type": "CLIPImageProcessor", "size": "big"}', "is no image processor"),
    "no JSON": ("{", "is no image processor"),
}


@pytest.mark.parametrize("text, message", BROKEN.values(), ids=BROKEN)
def test_file_that_is_no_image_processor_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ImageError, match=message) as error:
        load_image_processor(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_images_of_different_sizes_are_named() -> None:
    processor = load_image_processor(Path("nowhere"), VisionConfig.from_dict(CLIP))
    processor.do_center_crop = False
    with pytest.raises(ImageError, match=r"different sizes: \(3, 20, 28\), \(3, 24, 20\)"):
        preprocess_images([noise(10, 12), noise(14, 10)], processor, None)
