"""VILA's preprocessing of an image for the tower, written out in Pillow and numpy."""

import numpy as np
from PIL import Image

MEANS = {  # of the towers' training, with their deviations
    "siglip_vision_model": ([0.5] * 3, [0.5] * 3),
    "clip_vision_model": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "intern_vit_6b": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def written_out(image: Image.Image, kind: str, mode: str | None, side: int) -> np.ndarray:
    """[3, side, side] as VILA's code has it, step by step."""
    mean, std = MEANS[kind]
    w, h = image.size
    if mode == "resize":
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    if mode == "pad" and w != h:
        square = Image.new("RGB", (max(w, h), max(w, h)), tuple(int(255 * x) for x in mean))
        square.paste(image, (0, (w - h) // 2) if w > h else ((h - w) // 2, 0))
        image = square
    if kind == "clip_vision_model":
        w, h = image.size
        size = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    x = np.asarray(image).astype(np.float64) / 255
    return ((x - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
