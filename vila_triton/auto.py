"""`import vila_triton.auto` lets the Auto classes of transformers know VILA (see `vila_triton.hf.auto`)."""

from .hf.auto import VilaLlamaConfig, VilaLlamaForCausalLM, VilaProcessor

__all__ = ["VilaLlamaConfig", "VilaLlamaForCausalLM", "VilaProcessor"]
