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

from .awq_scales import SCALE_GROUPS
from .llm_awq import CLIPPED_LINEARS, AwqSearchResult

HF_NAMES = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
PRECEDING_OP = {
    "attention": "input_layernorm",
    "o": HF_NAMES["v"],
    "mlp": "post_attention_layernorm",
    "down": HF_NAMES["up"],
}


def save_awq_cache(path: Path, layers: Sequence[AwqSearchResult]) -> None:
    """Write {"scale": [(preceding, (following, ...), [k])], "clip": [(linear, [n, G, 1])]} in llm-awq's order.

    It applies the entries in the order of the file, and rounds after each.
    """
    scale: list[Any] = []
    clip: list[Any] = []
    for i, result in enumerate(layers):
        prefix = f"model.layers.{i}."
        for scale_group in filter(result.scales.__contains__, SCALE_GROUPS):
            following = tuple(prefix + HF_NAMES[name] for name in SCALE_GROUPS[scale_group])
            scale.append((prefix + PRECEDING_OP[scale_group], following, result.scales[scale_group].cpu()))
        clipped = filter(result.clips.__contains__, CLIPPED_LINEARS)
        clip += [(prefix + HF_NAMES[name], result.clips[name][..., None].cpu()) for name in clipped]
    write_pt(path, {"scale": scale, "clip": clip})


def load_awq_cache(path: Path, cfg: LlamaConfig, group_size: int, dtype: torch.dtype) -> list[AwqSearchResult]:
    """Read such a file, in its order, as tensors of the given dtype. Linears that it does not name stay unscaled and
    unclipped.

    Errors: `LoadError` if it is no such file, or is of another model or group size.
    """
    num_layers, specs = cfg.num_hidden_layers, llama.param_specs(cfg, torch.float16).layers[0]
    require_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # its message advises to load without weights_only, which would run code from the file
        raise LoadError(f"{path} is not a cache that llm-awq writes (torch.save of scale and clip)") from None
    if not isinstance(content, dict) or set(content) != {"scale", "clip"}:
        raise LoadError(f"{path} is not a cache that llm-awq writes: expected a dictionary of scale and clip")
    results = [AwqSearchResult({}, {}, {}) for _ in range(num_layers)]
    scale_groups = {(PRECEDING_OP[g], tuple(HF_NAMES[n] for n in names)): g for g, names in SCALE_GROUPS.items()}
    linears = {HF_NAMES[name]: name for name in CLIPPED_LINEARS}
    try:
        for preceding, following, s in content["scale"]:
            i, first = parse_layer_name(preceding, num_layers)
            parsed = [parse_layer_name(name, num_layers) for name in following]
            scale_group = scale_groups[first, tuple(name for _, name in parsed)]
            if {j for j, _ in parsed} != {i}:
                raise KeyError(preceding)
            shape = getattr(specs, SCALE_GROUPS[scale_group][0]).weight.shape[1:]
            results[i].scales[scale_group] = check_tensor(preceding, s, shape, dtype)
            if not (results[i].scales[scale_group] > 0).all():
                raise ValueError(f"{preceding}: a scale is not above 0 in {dtype}")
        for name, bound in content["clip"]:
            i, linear = parse_layer_name(name, num_layers)
            n, k = getattr(specs, linears[linear]).weight.shape
            results[i].clips[linears[linear]] = check_tensor(name, bound, (n, k // group_size, 1), dtype)[..., 0]
            if (bound < 0).any():
                raise ValueError(f"{name}: a bound is below 0")
        if not content["scale"] and not content["clip"]:
            raise ValueError("it holds no scale and no clip")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        expected = f"a LLaMA of {num_layers} layers in groups of {group_size}"
        raise LoadError(f"{path} does not fit {expected}: {error}") from None
    return results


def parse_layer_name(name: str, num_layers: int) -> tuple[int, str]:
    """Split a name: "model.layers.3.mlp.up_proj" -> (3, "mlp.up_proj")."""
    model, container, i, suffix = name.split(".", 3)
    if (model, container) != ("model", "layers") or int(i) not in range(num_layers):
        raise KeyError(name)
    return int(i), suffix


def check_tensor(name: str, x: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Convert x to a dtype. Errors: ValueError if it has another shape, or is not finite in it."""
    if not isinstance(x, Tensor) or x.shape != tuple(shape) or not x.is_floating_point() or not torch.isfinite(x).all():
        actual = list(getattr(x, "shape", [type(x).__name__]))
        raise ValueError(f"{name} is {actual}, expected finite numbers [{', '.join(map(str, shape))}]")
    if not torch.isfinite(x.to(dtype)).all():
        raise ValueError(f"{name} holds numbers beyond {dtype}, which the checkpoint is in")
    return x.to(dtype)
