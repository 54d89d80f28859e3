"""The geometry of the tiny VILA and its checkpoint folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vila_triton.models import llama, params, projector, vision
from vila_triton.models.config import LlamaConfig, ProjectorConfig, VilaConfig, VisionConfig
from vila_triton.tiny import tokenizer
from vila_triton.tiny.scenes import SIZE

CONFIG = VilaConfig(
    llm=LlamaConfig(
        vocab_size=tokenizer.VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    ),
    vision_tower=VisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
    ),
    mm_projector=ProjectorConfig("mlp_downsample", mm_hidden_size=128, hidden_size=256),
)

DECLARE = {"llm": llama.declare, "vision_tower": vision.declare, "mm_projector": projector.declare}


def configs(cfg: VilaConfig) -> dict[str, dict[str, Any]]:
    """The config.json of each part, and under "" the one that joins them."""
    ids = {f"{name}_token_id": tokenizer.SPECIAL.index(tokenizer.NAMED[name]) for name in ("bos", "eos", "pad")}
    parts = {
        "llm": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **{key: value for key, value in asdict(cfg.llm).items() if value is not None},
            **ids,
            "torch_dtype": "float16",
            "tokenizer_model_max_length": cfg.llm.max_position_embeddings,
            "tokenizer_padding_side": "right",
        },
        "vision_tower": {
            "architectures": ["SiglipVisionModel"],
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            **{key: value for key, value in asdict(cfg.vision_tower).items() if key != "select_layer"},
            "attention_dropout": 0.0,
            "vision_use_head": False,
            "torch_dtype": "float16",
        },
        "mm_projector": {
            "architectures": ["MultimodalProjector"],
            "model_type": "v2l_projector",
            "mm_projector_type": cfg.mm_projector.mm_projector_type,
            "torch_dtype": "float16",
        },
    }
    joined = {
        "architectures": ["VilaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{f"{name}_cfg": part for name, part in parts.items()},
        "hidden_size": cfg.llm.hidden_size,
        "mm_hidden_size": cfg.vision_tower.hidden_size,
        "mm_vision_select_layer": cfg.vision_tower.select_layer,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "resize",
        "model_dtype": "torch.float16",
        "s2": False,
        "tune_language_model": True,
        "tune_vision_tower": True,
        "tune_mm_projector": True,
    }
    return {**parts, "": joined}


def preprocessor(cfg: VilaConfig) -> dict[str, Any]:
    """What the image processor does; to a picture of the right size, only scale [0, 255] to [-1, 1]."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": cfg.vision_tower.image_size, "width": cfg.vision_tower.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }


def save(folder: Path, cfg: VilaConfig, trees: dict[str, Any]) -> None:
    """Writes a VILA folder: for each of llm, vision_tower and mm_projector its config and its weights in fp16."""
    for name, config in configs(cfg).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, tree in trees.items():
        specs = params.leaves(DECLARE[name](getattr(cfg, name), torch.float16))
        tensors = {
            spec.key: leaf.detach().to(spec.dtype).contiguous()
            for spec, leaf in zip(specs, params.leaves(tree), strict=True)
        }
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(preprocessor(cfg), indent=2)
    (folder / "vision_tower" / "preprocessor_config.json").write_text(text + "\n")
    tokenizer.save(folder / "llm")
