"""Small random models of transformers: a Llama with heads of 64 and a Qwen2 with heads of 72, with grouped queries."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

CLASSES: dict[str, tuple[Any, Any, int]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, 64),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, 72),
}
VOCAB_SIZE = 97


def small_model(kind: str, dtype: torch.dtype = torch.float32, gain: float = 8.0, **options: Any) -> Any:
    """A model of two layers, the same for every dtype and attention; with a gain its answers do not repeat one word.

    options: further values of its config, and `attn_implementation`.
    """
    model_class, config_class, head_dim = CLASSES[kind]
    attention = options.pop("attn_implementation", "eager")
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": head_dim, "max_position_embeddings": 128}
    ids = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = config_class(**{**sizes, **heads, **ids, **options})
    torch.manual_seed(0)
    model: Any = model_class._from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)
    for name, p in model.named_parameters():
        if p.ndim == 2 and "layers" in name:
            p.data.mul_(gain)
        elif p.ndim == 1:
            p.data.add_(torch.randn_like(p) * 0.2)
    return model.to(dtype).eval()


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    """Token ids, none of which is padding."""
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))
