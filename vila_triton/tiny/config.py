"""The geometry of the tiny VILA and its checkpoint folder."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vila_triton.checkpoints import loading
from vila_triton.checkpoints.int4_layouts import NATIVE
from vila_triton.checkpoints.quantization_config import make_quantization_config
from vila_triton.files.atomic import write_json
from vila_triton.models import llama, params, projector, vila, vision
from vila_triton.models.config import LlamaConfig, ProjectorConfig, VilaConfig, VisionConfig
from vila_triton.tiny import tokenizer
from vila_triton.tiny.scenes import IMAGE_SIZE

CONFIG = VilaConfig(
    llm=LlamaConfig(
        vocab_size=tokenizer.VOCAB_SIZE,
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
        image_size=IMAGE_SIZE,
        patch_size=8,
    ),
    mm_projector=ProjectorConfig("mlp_downsample", mm_hidden_size=128, hidden_size=256),
)

PARAM_SPECS = {"llm": llama.param_specs, "vision_tower": vision.param_specs, "mm_projector": projector.param_specs}
GROUP_SIZE = 64  # of the int4 checkpoint
INT4_FIELDS = ("group_size", "rounding", "dense_linears")  # belong to quantization_config
SIGLIP_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
    *("num_channels", "layer_norm_eps", "model_type", "hidden_act"),
)


def quantization_entry(cfg: VilaConfig) -> dict[str, Any]:
    """Return the entry of llm/config.json for int4 linears, an empty dictionary if there are none."""
    if cfg.llm.group_size is None:
        return {}
    return make_quantization_config(NATIVE, cfg.llm.group_size, cfg.llm.rounding)


def config_files(cfg: VilaConfig) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the top config.json and that of each part."""
    ids = {
        f"{name}_token_id": tokenizer.SPECIAL_TEXTS.index(tokenizer.SPECIAL_TOKENS[name])
        for name in ("bos", "eos", "pad")
    }
    parts = {
        "llm": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **{key: value for key, value in asdict(cfg.llm).items() if value is not None and key not in INT4_FIELDS},
            **quantization_entry(cfg),
            **ids,
            "torch_dtype": "float16",
            "tokenizer_model_max_length": cfg.llm.max_position_embeddings,
            "tokenizer_padding_side": "right",
        },
        "vision_tower": {
            "architectures": ["SiglipVisionModel"],
            **{key: getattr(cfg.vision_tower, key) for key in SIGLIP_FIELDS},
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
    top = {
        "architectures": ["VilaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_size": cfg.llm.hidden_size,
        "mm_hidden_size": cfg.vision_tower.hidden_size,
        "mm_vision_select_layer": cfg.vision_tower.select_layer,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "resize",
        "conversation_template": "vicuna_v1_nosys",
        "model_dtype": "torch.float16",
        "s2": False,
        "tune_language_model": True,
        "tune_vision_tower": True,
        "tune_mm_projector": True,
    }
    return top, parts


def preprocessor_config(cfg: VilaConfig) -> dict[str, Any]:
    """Return preprocessor_config.json; an image of the right size is only scaled from [0, 255] to [-1, 1]."""
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


def save_checkpoints(folder: Path, trees: dict[str, Any]) -> None:
    """Write the trained trees as a VILA folder in fp16, and beside it `folder`-int4, quantized by round to nearest."""
    half = vila.Vila(**{name: params.tree_map(lambda x: x.detach().half(), tree) for name, tree in trees.items()})
    write_folder(folder, CONFIG, half)
    int4_config = replace(CONFIG, llm=replace(CONFIG.llm, group_size=GROUP_SIZE))
    int4 = replace(half, llm=llama.quantize_linears_rtn(half.llm, GROUP_SIZE))
    write_folder(folder.with_name(f"{folder.name}-int4"), int4_config, int4)


def write_folder(folder: Path, cfg: VilaConfig, p: vila.Vila) -> None:
    """Write one VILA folder: configs, weights, image processor and tokenizer."""
    loading.save_checkpoint(folder, *config_files(cfg), p)
    write_json(folder / "vision_tower" / "preprocessor_config.json", preprocessor_config(cfg))
    tokenizer.save_tokenizer(folder / "llm")
