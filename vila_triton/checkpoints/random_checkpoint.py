"""The models of configs/models/ with random weights, in the layout and under the names of their releases."""

import tomllib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_triton.files.atomic import write_json
from vila_triton.models import vila
from vila_triton.models.params import LazyTensors, ParameterSpec, leaves
from vila_triton.paths import config_dir

from .int4_layouts import NATIVE
from .int4_views import quantize_linears_rtn
from .loading import TOWER_PREFIX, build_vila_config
from .quantization_config import make_quantization_config
from .sources import PARTS, CheckpointSource

IMAGENET_NORMALIZATION = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIGLIP_NORMALIZATION = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
ARCHITECTURES = {
    "siglip_vision_model": "SiglipVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "intern_vit_6b": "InternVisionModel",
}
SIGLIP_FIELDS = {"hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
EOS_TOKENS = {"llama_3": "<|end_of_text|>", "hermes-2": "<|im_end|>"}  # by template; else </s>


def read_model_toml(model: str | Path) -> dict[str, Any]:
    """Read a file of configs/models/, by name or path, that has all three parts.

    Errors: ValueError, which lists the names.
    """
    files = {file.stem: file for file in sorted((config_dir() / "models").glob("*.toml"))}
    file = files.get(str(model), Path(model))
    if not file.is_file():
        raise ValueError(f"no model {str(model)!r}; there are: {', '.join(files)}, or give the path of a .toml file")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no TOML: {error}") from None
    if missing := [part for part in PARTS if part not in values]:
        raise ValueError(f"{file} has no {', '.join(missing)}: it is no VILA")
    return values


def scale_down(model: Mapping[str, Any], max_layers: int | None, width_divisor: int) -> dict[str, Any]:
    """The same model with at most max_layers layers and all widths divided by width_divisor.

    There are as many heads, each narrower; an intermediate width is rounded up to a multiple of 64, as int4 layouts
    need it. Errors: ValueError if width_divisor does not divide the widths.
    """
    llm, tower = dict(model["llm"]), dict(model["vision_tower"])
    for part, values in (("llm", llm), ("vision_tower", tower)):
        width, heads = values["hidden_size"], values["num_attention_heads"]
        if width_divisor < 1 or width % (width_divisor * heads):
            raise ValueError(f"{part}: {width} numbers in {heads} heads cannot be divided by {width_divisor}")
        values["hidden_size"] = width // width_divisor
        values["intermediate_size"] = -(-values["intermediate_size"] // width_divisor // 64) * 64
        if width_divisor == 1:
            values["intermediate_size"] = model[part]["intermediate_size"]
    llm["vocab_size"] = max(1024, llm["vocab_size"] // width_divisor) if width_divisor > 1 else llm["vocab_size"]
    if max_layers is not None:
        if max_layers < 1:
            raise ValueError(f"{max_layers} layers: a model has at least 1")
        llm["num_hidden_layers"] = min(max_layers, llm["num_hidden_layers"])
        unused_layers = -1 - tower["select_layer"]  # layers of the tower that are there and not run
        tower["num_hidden_layers"] = min(max_layers + unused_layers, tower["num_hidden_layers"])
    return {**model, "llm": llm, "vision_tower": tower}


def released_configs(model: Mapping[str, Any], dtype: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The top config.json of a release, and those of its parts."""
    tower, llm = dict(model["vision_tower"]), model["llm"]
    select_layer, scales = tower.pop("select_layer"), tower.pop("s2_scales", None)
    model_type = tower["model_type"]
    eos_token_id = special_tokens(model["template"]).index(EOS_TOKENS.get(model["template"], "</s>"))
    part_configs = {
        "llm": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "rope_scaling": None,
            **llm,
            "bos_token_id": 0,
            "eos_token_id": eos_token_id,
            "torch_dtype": dtype,
            "tokenizer_model_max_length": 4096,
            "tokenizer_padding_side": "right",
        },
        "vision_tower": {
            "architectures": [ARCHITECTURES[model_type]],
            "torch_dtype": dtype,
            **tower,
            **(SIGLIP_FIELDS if model_type.startswith("siglip") else {}),
        },
        "mm_projector": {"architectures": ["MultimodalProjector"], "model_type": "v2l_projector", "torch_dtype": dtype}
        | model["mm_projector"],
    }
    config = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "hidden_size": llm["hidden_size"],
        "mm_hidden_size": tower["hidden_size"] * len(scales or [1]),
        "mm_vision_select_layer": select_layer,
        "mm_vision_select_feature": "patch" if model_type.startswith("intern") else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "resize",
        "interpolate_mode": "linear",
        "vision_resolution": -1,
        "num_video_frames": 8,
        "model_dtype": f"torch.{dtype}",
        "s2": scales is not None,
        "s2_scales": ",".join(map(str, scales)) if scales else "336,672,1008",
        "s2_max_split_size": min(scales) if scales else 336,
        "conversation_template": model["template"],
        "llm_cfg": None,
        "vision_tower_cfg": None,
        "mm_projector_cfg": None,
        "resume_path": "./vlm",
    }
    return config, part_configs


def random_checkpoint(
    model: Mapping[str, Any], dtype: str = "float16", group_size: int | None = None, seed: int = 0
) -> CheckpointSource:
    """A model with random tensors, each generated when it is accessed, from its name and the seed alone.

    With a group size, the linears of its language model are int4, rounded to nearest.
    """
    config, part_configs = released_configs(model, dtype)
    cfg = build_vila_config(config, part_configs)
    specs = vila.param_specs(cfg, getattr(torch, dtype))
    tensors = {}
    for part in PARTS:
        prefix = TOWER_PREFIX if part == "vision_tower" and not cfg.vision_tower.model_type.startswith("intern") else ""
        tensors[part] = random_tensors({prefix + spec.key: spec for spec in leaves(getattr(specs, part))}, seed)
    if group_size:
        part_configs["llm"] |= make_quantization_config(NATIVE, group_size, "sub")
        linears = [name.removesuffix(".weight") for name in tensors["llm"] if name.endswith("_proj.weight")]
        tensors["llm"] = quantize_linears_rtn(tensors["llm"], linears, group_size)
    layout = NATIVE if group_size else None
    return CheckpointSource(Path(model["name"]), "random weights", config, part_configs, tensors, {}, layout)


def random_tensors(specs: Mapping[str, ParameterSpec], seed: int) -> LazyTensors:
    """Random tensors of the given specs, by name."""

    def draw(name: str) -> Tensor:
        return specs[name].init_tensor(torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))

    meta = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    return LazyTensors(meta, draw)


def special_tokens(template: str) -> list[str]:
    """The special tokens of a template's models, in id order; the first is the BOS."""
    return {
        "llama_3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "hermes-2": ["<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }.get(template, ["<s>", "</s>"])


def write_tokenizer_and_processor(model: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write a tokenizer of single bytes with the template's special tokens, and the image processor's config.

    Returns the folder of each part.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = special_tokens(model["template"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
    )
    folders = {part: folder / part for part in ("llm", "vision_tower")}
    eos_token = EOS_TOKENS.get(model["template"], "</s>")
    names = {"bos_token": special[0], "eos_token": eos_token, "pad_token": eos_token}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folders["llm"])
    is_internvit = model["vision_tower"]["model_type"].startswith("intern")
    image_size = model["vision_tower"]["image_size"]
    processor = {
        "image_processor_type": "CLIPImageProcessor" if is_internvit else "SiglipImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size} if is_internvit else {"height": image_size, "width": image_size},
        "do_center_crop": is_internvit,
        **({"crop_size": {"height": image_size, "width": image_size}} if is_internvit else {}),
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **(IMAGENET_NORMALIZATION if is_internvit else SIGLIP_NORMALIZATION),
    }
    folders["vision_tower"].mkdir()
    write_json(folders["vision_tower"] / "preprocessor_config.json", processor)
    return folders
