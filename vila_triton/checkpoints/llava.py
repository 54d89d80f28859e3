"""LLaVA-1.5 (Liu et al. 2023) in its two layouts, as what a VILA folder of the same model would hold.

Original: one state dict in a folder whose config.json is a LLaMA's with a few fields more. `mm_vision_tower` names the
tower: a folder, or CLIP's name if the tower is among the tensors or in a folder beside.
transformers' llava-hf: one state dict, one config.json with `text_config` and `vision_config`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.reading import LoadError, folder_in, read_json, shown
from ..models.config import Dtype
from ..models.config_fields import expected, object_in
from ..models.params import Lazy
from .sources import PARTS, Source, int4_config
from .tensor_files import open_tensors

CLIP = {  # openai/clip-vit-large-patch14-336, as its config.json has it
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
LLAMA = {  # what transformers' LlamaConfig is where a text_config says nothing
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
# Names in each layout -> those in the parts of a VILA folder. What begins with none of them stays with the llm.
ORIGINAL = {
    "model.mm_projector.": ("mm_projector", "layers."),
    "model.vision_tower.vision_tower.": ("vision_tower", ""),
}
TRANSFORMERS = {  # "model." in front of them, or not, by transformers' age
    "multi_modal_projector.linear_1.": ("mm_projector", "layers.0."),
    "multi_modal_projector.linear_2.": ("mm_projector", "layers.2."),
    "vision_tower.": ("vision_tower", ""),
    "language_model.model.": ("llm", "model."),
    "language_model.lm_head.": ("llm", "lm_head."),
    "language_model.": ("llm", "model."),
}


def is_llava(folder: Path, top: Mapping[str, Any]) -> bool:
    """Whether a folder and its top config are a LLaVA's; an older VILA's config names its tower as a LLaVA's does."""
    parts = (folder / "llm").is_dir() or any(top.get(f"{part}_cfg") for part in PARTS)
    return "text_config" in top or ("mm_vision_tower" in top and not parts)


def llava_source(folder: Path, top: Mapping[str, Any]) -> Source:
    """A LLaVA-1.5 folder of either layout. Errors: `LoadError`."""
    return transformers_source(folder, top) if "text_config" in top else original_source(folder, top)


def original_source(folder: Path, top: Mapping[str, Any]) -> Source:
    tensors = sorted_out(open_tensors(folder), ORIGINAL)
    llm = {k: v for k, v in top.items() if not k.startswith(("mm_", "tune_mm", "freeze_mm", "image_", "use_mm"))}
    llm |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    tower, beside = clip_of(folder, top, has_weights="vision_tower" in tensors)
    if "vision_tower" not in tensors:
        tensors["vision_tower"] = vision_only(open_tensors(beside))
    return assembled(folder, "LLaVA, original layout", llm, tower, beside, tensors, top)


def transformers_source(folder: Path, top: Mapping[str, Any]) -> Source:
    tensors = sorted_out(open_tensors(folder), TRANSFORMERS)
    llm, tower = (object_in(top, name, f"{folder}/config.json") for name in ("text_config", "vision_config"))
    llm = LLAMA | {k: v for k, v in llm.items() if v is not None}
    tower = {k: v for k, v in tower.items() if v is not None}
    strategy = top.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise LoadError(f"{folder}: vision_feature_select_strategy is {shown(strategy)}, expected 'default' or 'full'")
    act = top.get("projector_hidden_act", "gelu")
    if act != "gelu":
        raise LoadError(f"{folder}: projector_hidden_act is {shown(act)}, expected 'gelu'")
    fields = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": top.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "patch" if strategy == "default" else "cls_patch",
        "torch_dtype": top.get("torch_dtype") or top.get("dtype") or llm.get("torch_dtype") or llm.get("dtype"),
    }
    tower = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", **tower}
    return assembled(folder, "LLaVA, transformers' layout", llm, tower, folder, tensors, fields)


def sorted_out(tensors: Lazy, prefixes: Mapping[str, tuple[str, str]]) -> dict[str, Lazy]:
    """The tensors of one state dict by part, under the names of that part."""
    names: dict[str, dict[str, str]] = {}
    for name in tensors.meta:
        short = name.removeprefix("model.") if prefixes is TRANSFORMERS else name
        prefix = next((prefix for prefix in prefixes if short.startswith(prefix)), None)
        part, new = prefixes[prefix] if prefix else ("llm", name)
        names.setdefault(part, {})[new + short.removeprefix(prefix) if prefix else name] = name
    return {part: tensors.named(held) for part, held in names.items()}


def clip_of(folder: Path, top: Mapping[str, Any], has_weights: bool) -> tuple[dict[str, Any], Path]:
    """The config of the tower that `mm_vision_tower` names, and the folder it stands in (else the model's)."""
    name = str(top.get("mm_vision_tower") or top.get("vision_tower"))
    for said in (name, Path(name).name, "vision_tower"):
        place = folder_in(folder, said)
        if place and (place / "config.json").exists():
            config = read_json(place / "config.json")
            return object_in(config, "vision_config", f"{place}/config.json") or config, place  # of a CLIP what sees
    if has_weights and name == CLIP_NAME:
        return dict(CLIP), folder
    wanted = "its config.json" if has_weights else "its config.json and weights"
    raise LoadError(
        f"{folder}: mm_vision_tower is {shown(name)}, which is not here; put {wanted} into {folder / 'vision_tower'}"
    )


def vision_only(tensors: Lazy) -> Lazy:
    """Of a whole CLIP, the tensors of its tower."""
    names = [name for name in tensors.meta if name.startswith("vision_model.")]
    return tensors.named({name: name for name in names}) if names else tensors


def assembled(
    folder: Path,
    kind: str,
    llm: Mapping[str, Any],
    tower: Mapping[str, Any],
    beside: Path,
    tensors: dict[str, Lazy],
    fields: Mapping[str, Any],
) -> Source:
    missing = [part for part in PARTS if part not in tensors]
    if missing:
        raise LoadError(f"{folder}: no tensors of {', '.join(missing)} among those of a {kind}")
    said = fields.get("torch_dtype") or fields.get("dtype") or "float16"
    dtype = str(said).removeprefix("torch.")
    if wanted := expected(Dtype, dtype):
        raise LoadError(f"{folder}/config.json: torch_dtype is {shown(said)}, expected {wanted}")
    top = {
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
    llm, layout = int4_config(llm, tensors["llm"], str(folder))
    if layout is not None:
        raise LoadError(f"{folder}: int4 is not read in the {kind}; convert it before quantizing")
    parts = {"llm": llm, "vision_tower": dict(tower), "mm_projector": projector}
    places = {"llm": folder, "vision_tower": beside, "mm_projector": folder}
    return Source(folder, kind, {k: v for k, v in top.items() if v is not None}, parts, tensors, places)
