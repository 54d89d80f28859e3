"""The models of configs/models/ with random weights, in the layout and under the names of their releases."""

import tomllib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import vila
from ..models.params import Lazy, Spec, leaves
from ..paths import config_dir
from .int4_layouts import OURS
from .int4_views import rounded
from .loading import TOWER_PREFIX, geometry
from .shard_writer import write_json
from .sources import PARTS, Source, quantization

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
ARCHITECTURES = {
    "siglip_vision_model": "SiglipVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "intern_vit_6b": "InternVisionModel",
}
STOPS = {"llama_3": "<|end_of_text|>", "hermes-2": "<|im_end|>"}  # by template; else </s>


def table(model: str | Path) -> dict[str, Any]:
    """A file of configs/models/, by name or path, that has all three parts. Errors: ValueError naming what there is."""
    known = {file.stem: file for file in sorted((config_dir() / "models").glob("*.toml"))}
    file = known.get(str(model), Path(model))
    if not file.is_file():
        raise ValueError(f"no model {str(model)!r}; there are: {', '.join(known)}, or give the path of a .toml file")
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no TOML: {error}") from None
    if missing := [part for part in PARTS if part not in found]:
        raise ValueError(f"{file} has no {', '.join(missing)}: it is no VILA")
    return found


def narrowed(found: Mapping[str, Any], layers: int | None, narrow: int) -> dict[str, Any]:
    """The same model with fewer layers and all widths divided: as many heads, each narrower; an intermediate width
    rounded up to a multiple of 64, which int4 layouts want. Errors: ValueError if `narrow` does not divide the widths.
    """
    llm, tower = dict(found["llm"]), dict(found["vision_tower"])
    for part, values in (("llm", llm), ("vision_tower", tower)):
        width, heads = values["hidden_size"], values["num_attention_heads"]
        if narrow < 1 or width % (narrow * heads):
            raise ValueError(f"{part}: {width} numbers in {heads} heads cannot be divided by {narrow}")
        values["hidden_size"] = width // narrow
        values["intermediate_size"] = -(-values["intermediate_size"] // narrow // 64) * 64
        if narrow == 1:
            values["intermediate_size"] = found[part]["intermediate_size"]
    llm["vocab_size"] = max(1024, llm["vocab_size"] // narrow) if narrow > 1 else llm["vocab_size"]
    if layers is not None:
        if layers < 1:
            raise ValueError(f"{layers} layers: a model has at least 1")
        llm["num_hidden_layers"] = min(layers, llm["num_hidden_layers"])
        unseen = -1 - tower["select_layer"]  # layers of the tower that are there and not run
        tower["num_hidden_layers"] = min(layers + unseen, tower["num_hidden_layers"])
    return {**found, "llm": llm, "vision_tower": tower}


def released_configs(found: Mapping[str, Any], dtype: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The top config.json of a release, and those of its parts."""
    tower, llm = dict(found["vision_tower"]), found["llm"]
    select, scales = tower.pop("select_layer"), tower.pop("s2_scales", None)
    kind = tower["model_type"]
    stop = special_tokens(found["template"]).index(STOPS.get(found["template"], "</s>"))
    parts = {
        "llm": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "rope_scaling": None,
            **llm,
            "bos_token_id": 0,
            "eos_token_id": stop,
            "torch_dtype": dtype,
            "tokenizer_model_max_length": 4096,
            "tokenizer_padding_side": "right",
        },
        "vision_tower": {
            "architectures": [ARCHITECTURES[kind]],
            "torch_dtype": dtype,
            **tower,
            **({"hidden_act": "gelu_pytorch_tanh", "vision_use_head": False} if kind.startswith("siglip") else {}),
        },
        "mm_projector": {"architectures": ["MultimodalProjector"], "model_type": "v2l_projector", "torch_dtype": dtype}
        | found["mm_projector"],
    }
    top = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "hidden_size": llm["hidden_size"],
        "mm_hidden_size": tower["hidden_size"] * len(scales or [1]),
        "mm_vision_select_layer": select,
        "mm_vision_select_feature": "patch" if kind.startswith("intern") else "cls_patch",
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
        "conversation_template": found["template"],
        "llm_cfg": None,
        "vision_tower_cfg": None,
        "mm_projector_cfg": None,
        "resume_path": "./vlm",
    }
    return top, parts


def random_source(found: Mapping[str, Any], dtype: str = "float16", group: int | None = None, seed: int = 0) -> Source:
    """A released model whose tensors are drawn when they are asked for, each by its name and the seed alone; with a
    group size, its linears rounded to int4.
    """
    top, parts = released_configs(found, dtype)
    cfg = geometry(top, parts)
    specs = vila.declare(cfg, getattr(torch, dtype))
    tensors = {}
    for part in PARTS:
        prefix = TOWER_PREFIX if part == "vision_tower" and not cfg.vision_tower.model_type.startswith("intern") else ""
        tensors[part] = drawn({prefix + spec.key: spec for spec in leaves(getattr(specs, part))}, seed)
    if group:
        parts["llm"] |= quantization(OURS, group, "sub")
        linears = [name.removesuffix(".weight") for name in tensors["llm"] if name.endswith("_proj.weight")]
        tensors["llm"] = rounded(tensors["llm"], linears, group)
    return Source(Path(found["name"]), "random weights", top, parts, tensors, {}, OURS if group else None)


def drawn(specs: Mapping[str, Spec], seed: int) -> Lazy:
    def draw(name: str) -> Tensor:
        return specs[name].tensor(torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))

    return Lazy({name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}, draw)


def special_tokens(template: str) -> list[str]:
    """The special tokens of a template's models, in id order; the first is the BOS."""
    return {
        "llama_3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "hermes-2": ["<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }.get(template, ["<s>", "</s>"])


def write_companions(found: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """A tokenizer of single bytes with the template's special tokens, and the image processor's config, by part."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = special_tokens(found["template"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
    )
    places = {part: folder / part for part in ("llm", "vision_tower")}
    stop = STOPS.get(found["template"], "</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=stop, pad_token=stop)
    fast.save_pretrained(places["llm"])
    intern, side = found["vision_tower"]["model_type"].startswith("intern"), found["vision_tower"]["image_size"]
    processor = {
        "image_processor_type": "CLIPImageProcessor" if intern else "SiglipImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side} if intern else {"height": side, "width": side},
        "do_center_crop": intern,
        **({"crop_size": {"height": side, "width": side}} if intern else {}),
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **(IMAGENET if intern else HALF),
    }
    places["vision_tower"].mkdir()
    write_json(places["vision_tower"] / "preprocessor_config.json", processor)
    return places
