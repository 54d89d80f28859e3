"""Picture and video files: every kind is seen as a viewer shows it, or refused by name."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vila_triton.images.processing import ImageError, decode_image, load_video_frames, open_image, to_rgb

RED, GREEN, CLEAR = (255, 0, 0, 255), (0, 128, 0, 128), (10, 20, 30, 0)


def array(image: Image.Image) -> Any:
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    """Every one of EXIF's eight orientations shows the same picture."""
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    shown = open_image(tmp_path / "a.png")
    assert shown.mode == "RGB" and (array(shown)[..., 0] == upright).all()
    assert to_rgb(shown).tobytes() == shown.tobytes()  # once is enough


def with_alpha() -> Image.Image:
    return Image.fromarray(np.array([[RED, GREEN, CLEAR]], dtype=np.uint8))


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "L").convert("P")
    image.putpalette([255, 0, 0, 127, 191, 127, 10, 20, 30])
    return image


KINDS: dict[str, tuple[Image.Image, dict[str, Any], list[tuple[int, ...]]]] = {
    "alpha": (with_alpha(), {}, [(255, 0, 0), (127, 191, 127), (255, 255, 255)]),
    "grey and alpha": (Image.merge("LA", (Image.new("L", (1, 1), 40), Image.new("L", (1, 1), 0))), {}, [(255,) * 3]),
    "palette": (palette(), {}, [(255, 0, 0), (127, 191, 127), (10, 20, 30)]),
    "palette with a clear colour": (palette(), {"transparency": 2}, [(255, 0, 0), (127, 191, 127), (255, 255, 255)]),
    "grey": (Image.fromarray(np.array([[7, 200]], dtype=np.uint8)), {}, [(7,) * 3, (200,) * 3]),
    "bits": (Image.new("1", (2, 1), 1), {}, [(255,) * 3] * 2),
    "16-bit grey": (
        Image.fromarray(np.array([[0, 128, 129, 32768, 65535]], dtype=np.uint16)),
        {},
        [(0,) * 3, (0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3],
    ),
}


@pytest.mark.parametrize("image, how, expected", KINDS.values(), ids=KINDS)
def test_image_of_every_mode_becomes_rgb_as_displayed(image: Image.Image, how: dict, expected: list, tmp_path) -> None:
    image.save(tmp_path / "a.png", **how)
    assert [tuple(x) for x in array(open_image(tmp_path / "a.png"))[0].tolist()] == expected


def test_cmyk_and_big_endian_images_are_read(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "a.jpg")
    assert array(open_image(tmp_path / "a.jpg")).max() == 0
    grey = Image.frombytes("I;16B", (2, 1), (65535).to_bytes(2, "big") + (257).to_bytes(2, "big"))
    assert array(to_rgb(grey))[0, :, 0].tolist() == [255, 1]


REFUSED: dict[str, tuple[Image.Image, str]] = {
    "floats": (Image.new("F", (2, 2), 0.5), "mode F.* have no known white; scale them to 0 to 255"),
    "32-bit numbers": (Image.new("I", (2, 2), 70000), "mode I.* have no known white"),
    "negative numbers": (Image.new("I", (2, 2), -1), "mode I.* have no known white"),
    "no pixels": (Image.new("RGB", (0, 3)), "it has 0 x 3 pixels"),
}


@pytest.mark.parametrize("image, message", REFUSED.values(), ids=REFUSED)
def test_image_without_known_white_or_pixels_is_refused(image: Image.Image, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=message):
        to_rgb(image)
    if image.width:
        image.save(tmp_path / "a.tiff")
        with pytest.raises(ImageError, match=f"a.tiff cannot be read as an image: .*{message}"):
            open_image(tmp_path / "a.tiff")


def test_image_beyond_pillows_pixel_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert open_image(tmp_path / "a.png").size == (60, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns beyond it, and refuses beyond twice that
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match=r"a.png .* more than 2000"):
        open_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"a.png cannot be read as an image: .*3000 pixels.*exceeds limit"):
        open_image(tmp_path / "a.png")


def test_video_frames_beyond_pillows_pixel_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = film(9)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4 * 96)
    assert len(load_video_frames(tmp_path / "a.gif", 4)) == 4
    with pytest.raises(ImageError, match=r"a.gif .*: 5 frames of 12 x 8 are more than 384 pixels"):
        load_video_frames(tmp_path / "a.gif", 5)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_truncated_or_damaged_image_is_named_or_read(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file := tmp_path / f"a.{suffix}")
    whole = file.read_bytes()
    for cut in range(0, len(whole) // 2, max(1, len(whole) // 25)):
        file.write_bytes(whole[:cut])
        with pytest.raises(ImageError, match=f"a.{suffix} cannot be read as an image"):
            open_image(file)
    for place in rng.integers(0, len(whole), 40):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            open_image(file)
        except ImageError as error:
            assert str(file) in str(error)


def test_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    for path, message in ((tmp_path / "a.txt", "cannot identify"), (tmp_path, "is a folder, expected a file")):
        with pytest.raises(ImageError, match=message):
            open_image(path)
    with pytest.raises(ImageError, match=r"none.png does not exist"):
        open_image(tmp_path / "none.png")


def film(count: int, size: tuple[int, int] = (12, 8)) -> list[Image.Image]:
    """Frame i is of the grey 8 i + 8."""
    return [Image.new("RGB", size, (8 * i + 8,) * 3) for i in range(count)]


def greys(images: list[Image.Image]) -> list[int]:
    return [int(array(image)[..., 0].mean()) for image in images]


SEEN = {  # frames, asked for -> which are seen; -1 is a black one
    (20, 6): [0, 3, 7, 10, 14, 18],
    (20, 1): [0],
    (9, 8): [0, 1, 2, 3, 4, 5, 6, 7],
    (8, 8): [0, 1, 2, 3, 4, 5, 6, 7],
    (3, 5): [-1, -1, 0, 1, 2],
    (2, 4): [-1, -1, 0, 1],
}


@pytest.mark.parametrize("suffix", ["", "gif", "webp", "png"])
@pytest.mark.parametrize("count, n", SEEN)
def test_video_frames_are_evenly_spaced(count: int, n: int, suffix: str, tmp_path: Path) -> None:
    video: Any = film(count)
    if suffix:
        how: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        video[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=video[1:], duration=40, **how)
        video = tmp_path / f"a.{suffix}"
    seen = load_video_frames(video, n)
    assert {image.size for image in seen} == {(12, 8)} and {image.mode for image in seen} == {"RGB"}
    assert greys(seen) == [8 * i + 8 if i >= 0 else 0 for i in SEEN[count, n]]


def test_default_image_of_an_apng_is_no_frame(tmp_path: Path) -> None:
    still, *moving = film(4)
    still.save(tmp_path / "a.png", save_all=True, append_images=moving, default_image=True)
    assert greys(load_video_frames(tmp_path / "a.png", 3)) == [16, 24, 32]


def test_image_as_video_and_video_as_image_are_refused(tmp_path: Path) -> None:
    first, *rest = film(3)
    first.save(tmp_path / "a.png")
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(99))
    with pytest.raises(ImageError, match=r"a.png cannot be read as a video .*it is one image"):
        load_video_frames(tmp_path / "a.png", 2)
    with pytest.raises(
        ImageError, match=r"a.gif cannot be read as an image: it is animated \(3 frames\); pass it as a"
    ):
        open_image(tmp_path / "a.gif")
    with pytest.raises(ImageError, match=r"a.mp4 cannot be read as a video \(an animated GIF, WebP or PNG\)"):
        load_video_frames(tmp_path / "a.mp4", 2)
    for video, n, message in ((film(2), 0, "at least 1 frame, not 0"), ([], 2, "a video of no frames")):
        with pytest.raises(ValueError, match=message):
            load_video_frames(video, n)


def test_bytes_are_decoded_as_the_same_file_is(tmp_path: Path):
    image = Image.new("RGBA", (3, 2), (255, 0, 0, 128))
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert decode_image(data).tobytes() == open_image(tmp_path / "a.png").tobytes() != image.convert("RGB").tobytes()


def test_bytes_that_are_no_image_are_refused_without_an_address_in_memory(monkeypatch: pytest.MonkeyPatch):
    def encode(image: Image.Image, **options: Any) -> bytes:
        file = BytesIO()
        image.save(file, **options)
        return file.getvalue()

    png, gif = (encode(Image.new("RGB", (40, 40)), format=format) for format in ("png", "gif"))
    animated = encode(Image.new("L", (4, 4)), format="gif", save_all=True, append_images=[Image.new("L", (4, 4), 9)])
    for data, formats, message in (
        (b"", None, "0 bytes that are no image"),
        (png[:60], None, "cannot be read as an image"),
        (gif, ("PNG",), "no image"),
        (animated, None, "animated"),
    ):
        with pytest.raises(ImageError, match=message) as error:
            decode_image(data, formats)
        assert "0x" not in str(error.value)
    with pytest.raises(ImageError, match="40 x 40 pixels, more than 1000"):
        decode_image(png, max_pixels=1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1599)
    for max_pixels in (None, 5000):
        with pytest.raises(ImageError, match="40 x 40 pixels, more than 1599"):
            decode_image(png, max_pixels=max_pixels)
