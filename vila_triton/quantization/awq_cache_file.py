"""llm-awq's `awq_cache/*.pt`: the scales and clips of a whole model under Hugging Face's names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_triton.checkpoints.writing import write_pt
from vila_triton.files.reading import require_file
from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.params import LoadError

from .awq_scales import PLACES
from .llm_awq import CLIPPED, Found

NAMES = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
BEFORE = {
    "attention": "input_layernorm",
    "o": NAMES["v"],
    "mlp": "post_attention_layernorm",
    "down": NAMES["up"],
}


def save(path: Path, layers: Sequence[Found]) -> None:
    """Write {"scale": [(before, (after, ...), [k])], "clip": [(linear, [n, G, 1])]}, in the order that llm-awq finds
    them in: it applies them in the order of the file, and rounds after each.
    """
    scale: list[Any] = []
    clip: list[Any] = []
    for i, found in enumerate(layers):
        at = f"model.layers.{i}."
        for place in filter(found.scales.__contains__, PLACES):
            after = tuple(at + NAMES[name] for name in PLACES[place])
            scale.append((at + BEFORE[place], after, found.scales[place].cpu()))
        clip += [(at + NAMES[name], found.clips[name][..., None].cpu()) for name in CLIPPED if name in found.clips]
    write_pt(path, {"scale": scale, "clip": clip})


def load(path: Path, cfg: LlamaConfig, group: int, dtype: torch.dtype) -> list[Found]:
    """Read such a file, as numbers of the checkpoint's dtype, in its order; of what it finds some of, the rest stays
    unscaled and unclipped.

    Errors: `LoadError` if it is no such file, or is of another model or another group size.
    """
    layers, like = cfg.num_hidden_layers, llama.declare(cfg, torch.float16).layers[0]
    require_file(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's words advise to load it without weights_only, which runs what the file says
        raise LoadError(f"{path} is not a cache that llm-awq writes (torch.save of scale and clip)") from None
    if not isinstance(held, dict) or set(held) != {"scale", "clip"}:
        raise LoadError(f"{path} is not a cache that llm-awq writes: expected a dictionary of scale and clip")
    found = [Found({}, {}, {}) for _ in range(layers)]
    places = {(BEFORE[place], tuple(NAMES[n] for n in PLACES[place])): place for place in PLACES}
    linears = {NAMES[name]: name for name in CLIPPED}
    try:
        for before, after, s in held["scale"]:
            (i, first), rest = split(before, layers), [split(name, layers) for name in after]
            place = places[first, tuple(name for _, name in rest)]
            if {j for j, _ in rest} != {i}:
                raise KeyError(before)
            found[i].scales[place] = checked(before, s, getattr(like, PLACES[place][0]).weight.shape[1:], dtype)
            if not (found[i].scales[place] > 0).all():
                raise ValueError(f"{before}: a scale is not above 0 in {dtype}")
        for name, bound in held["clip"]:
            i, linear = split(name, layers)
            n, k = getattr(like, linears[linear]).weight.shape
            found[i].clips[linears[linear]] = checked(name, bound, (n, k // group, 1), dtype)[..., 0]
            if (bound < 0).any():
                raise ValueError(f"{name}: a bound is below 0")
        if not held["scale"] and not held["clip"]:
            raise ValueError("it holds no scale and no clip")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LoadError(f"{path} does not fit a LLaMA of {layers} layers in groups of {group}: {error}") from None
    return found


def split(name: str, layers: int) -> tuple[int, str]:
    """ "model.layers.3.mlp.up_proj" -> (3, "mlp.up_proj")."""
    model, of, i, rest = name.split(".", 3)
    if (model, of) != ("model", "layers") or int(i) not in range(layers):
        raise KeyError(name)
    return int(i), rest


def checked(name: str, x: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x in this dtype. Errors: ValueError if it is of another shape, or not finite."""
    if not isinstance(x, Tensor) or x.shape != tuple(shape) or not x.is_floating_point() or not torch.isfinite(x).all():
        got = list(getattr(x, "shape", [type(x).__name__]))
        raise ValueError(f"{name} is {got}, expected finite numbers [{', '.join(map(str, shape))}]")
    if not torch.isfinite(x.to(dtype)).all():
        raise ValueError(f"{name} holds numbers beyond {dtype}, which the checkpoint is in")
    return x.to(dtype)
