"""LLaVA-1.5 (Liu et al. 2023) in its two layouts, read as a VILA folder of the same model.

Original: one state dict in a folder whose config.json is a LLaMA's with a few more fields. `mm_vision_tower` names the
vision tower: a folder, or CLIP's name if the tower is among the tensors or in a folder beside.
transformers' llava-hf: one state dict, one config.json with `text_config` and `vision_config`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila_triton.checkpoints.quantization_config import detect_quantization
from vila_triton.files.reading import LoadError, find_folder, read_json, short_repr
from vila_triton.models.config import Dtype
from vila_triton.models.config_fields import expected_instead, nested_object
from vila_triton.models.params import LazyTensors

from .sources import PARTS, CheckpointSource
from .tensor_files import open_tensors

CLIP_CONFIG = {  # openai/clip-vit-large-patch14-336, as its config.json has it
    "model_type": "clip_vision_model",
    "architectures": ["CLIPVisionModel"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_NAME = "openai/clip-vit-large-patch14-336"
LLAMA_DEFAULTS = {  # what transformers' LlamaConfig is where a text_config says nothing
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
# Names in each layout -> those in the parts of a VILA folder. What begins with none of them stays with the llm.
ORIGINAL_PREFIXES = {
    "model.mm_projector.": ("mm_projector", "layers."),
    "model.vision_tower.vision_tower.": ("vision_tower", ""),
}
TRANSFORMERS_PREFIXES = {  # "model." in front of them, or not, by transformers' age
    "multi_modal_projector.linear_1.": ("mm_projector", "layers.0."),
    "multi_modal_projector.linear_2.": ("mm_projector", "layers.2."),
    "vision_tower.": ("vision_tower", ""),
    "language_model.model.": ("llm", "model."),
    "language_model.lm_head.": ("llm", "lm_head."),
    "language_model.": ("llm", "model."),
}


def is_llava(folder: Path, config: Mapping[str, Any]) -> bool:
    """True if a folder with this top config is a LLaVA's. An older VILA's config names its tower as a LLaVA's does."""
    has_parts = (folder / "llm").is_dir() or any(config.get(f"{part}_cfg") for part in PARTS)
    return "text_config" in config or ("mm_vision_tower" in config and not has_parts)


def open_llava_folder(folder: Path, config: Mapping[str, Any]) -> CheckpointSource:
    """Open a LLaVA-1.5 folder of either layout. Errors: `LoadError`."""
    return open_transformers_llava(folder, config) if "text_config" in config else open_original_llava(folder, config)


def open_original_llava(folder: Path, config: Mapping[str, Any]) -> CheckpointSource:
    """Open a LLaVA-1.5 folder in its original layout. Errors: `LoadError`."""
    tensors = split_by_part(open_tensors(folder), ORIGINAL_PREFIXES)
    llm = {k: v for k, v in config.items() if not k.startswith(("mm_", "tune_mm", "freeze_mm", "image_", "use_mm"))}
    llm |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    tower, tower_dir = find_vision_tower(folder, config, has_weights="vision_tower" in tensors)
    if "vision_tower" not in tensors:
        tensors["vision_tower"] = select_clip_vision(open_tensors(tower_dir))
    return build_source(folder, "LLaVA, original layout", llm, tower, tower_dir, tensors, config)


def open_transformers_llava(folder: Path, config: Mapping[str, Any]) -> CheckpointSource:
    """Open a LLaVA-1.5 folder in transformers' layout. Errors: `LoadError`."""
    tensors = split_by_part(open_tensors(folder), TRANSFORMERS_PREFIXES)
    llm, tower = (nested_object(config, name, f"{folder}/config.json") for name in ("text_config", "vision_config"))
    llm = LLAMA_DEFAULTS | {k: v for k, v in llm.items() if v is not None}
    tower = {k: v for k, v in tower.items() if v is not None}
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        expected = "expected 'default' or 'full'"
        raise LoadError(f"{folder}: vision_feature_select_strategy is {short_repr(strategy)}, {expected}")
    if (act := config.get("projector_hidden_act", "gelu")) != "gelu":
        raise LoadError(f"{folder}: projector_hidden_act is {short_repr(act)}, expected 'gelu'")
    fields = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "patch" if strategy == "default" else "cls_patch",
        "torch_dtype": config.get("torch_dtype") or config.get("dtype") or llm.get("torch_dtype") or llm.get("dtype"),
    }
    tower = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", **tower}
    return build_source(folder, "LLaVA, transformers' layout", llm, tower, folder, tensors, fields)


def split_by_part(tensors: LazyTensors, prefixes: Mapping[str, tuple[str, str]]) -> dict[str, LazyTensors]:
    """Split the tensors of one state dict by part, under the names of that part."""
    names: dict[str, dict[str, str]] = {}
    for name in tensors.meta:
        bare_name = name.removeprefix("model.") if prefixes is TRANSFORMERS_PREFIXES else name
        prefix = next((prefix for prefix in prefixes if bare_name.startswith(prefix)), None)
        part, new_prefix = prefixes[prefix] if prefix else ("llm", name)
        names.setdefault(part, {})[new_prefix + bare_name.removeprefix(prefix) if prefix else name] = name
    return {part: tensors.rename(renames) for part, renames in names.items()}


def find_vision_tower(folder: Path, config: Mapping[str, Any], has_weights: bool) -> tuple[dict[str, Any], Path]:
    """The config of the tower that `mm_vision_tower` names, and its folder or the model's. Errors: `LoadError`."""
    name = str(config.get("mm_vision_tower") or config.get("vision_tower"))
    for candidate in (name, Path(name).name, "vision_tower"):
        tower_dir = find_folder(folder, candidate)
        if tower_dir and (tower_dir / "config.json").exists():
            tower_config = read_json(tower_dir / "config.json")
            nested = nested_object(tower_config, "vision_config", f"{tower_dir}/config.json")  # of a whole CLIP
            return nested or tower_config, tower_dir
    if has_weights and name == CLIP_NAME:
        return dict(CLIP_CONFIG), folder
    needed = "its config.json" if has_weights else "its config.json and weights"
    target = folder / "vision_tower"
    raise LoadError(f"{folder}: mm_vision_tower is {short_repr(name)}, which is not here; put {needed} into {target}")


def select_clip_vision(tensors: LazyTensors) -> LazyTensors:
    """The vision tower's tensors of a whole CLIP; all tensors if it is a vision tower already."""
    names = [name for name in tensors.meta if name.startswith("vision_model.")]
    return tensors.rename({name: name for name in names}) if names else tensors


def build_source(
    folder: Path,
    kind: str,
    llm: Mapping[str, Any],
    tower: Mapping[str, Any],
    tower_dir: Path,
    tensors: dict[str, LazyTensors],
    fields: Mapping[str, Any],
) -> CheckpointSource:
    """Put the parts of a LLaVA together as a VILA's, with the config fields of one.

    fields: those of the LLaVA's config that name the projector, the image features and the dtype. Errors: `LoadError`.
    """
    missing = [part for part in PARTS if part not in tensors]
    if missing:
        raise LoadError(f"{folder}: no tensors of {', '.join(missing)} among those of a {kind}")
    torch_dtype = fields.get("torch_dtype") or fields.get("dtype") or "float16"
    dtype = str(torch_dtype).removeprefix("torch.")
    if requirement := expected_instead(Dtype, dtype):
        raise LoadError(f"{folder}/config.json: torch_dtype is {short_repr(torch_dtype)}, expected {requirement}")
    config = {
        "architectures": ["VilaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_size": llm.get("hidden_size"),
        "mm_hidden_size": tower.get("hidden_size"),
        "mm_vision_select_layer": fields.get("mm_vision_select_layer"),
        "mm_vision_select_feature": fields.get("mm_vision_select_feature") or "patch",
        "image_aspect_ratio": fields.get("image_aspect_ratio"),
        "conversation_template": "vicuna_v1",
        "model_dtype": f"torch.{dtype}",
    }
    projector = {
        "architectures": ["MultimodalProjector"],
        "model_type": "v2l_projector",
        "mm_projector_type": fields.get("mm_projector_type") or "linear",
    }
    llm, layout = detect_quantization(llm, tensors["llm"], str(folder))
    if layout is not None:
        raise LoadError(f"{folder}: int4 is not read in the {kind}; convert it before quantizing")
    part_configs = {"llm": llm, "vision_tower": dict(tower), "mm_projector": projector}
    companion_dirs = {"llm": folder, "vision_tower": tower_dir, "mm_projector": folder}
    config = {k: v for k, v in config.items() if v is not None}
    return CheckpointSource(folder, kind, config, part_configs, tensors, companion_dirs)
