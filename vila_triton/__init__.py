"""VILA with int4 weights, chunked prefill and a paged KV cache, on Triton kernels that can be swapped and tested."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hf.auto import VilaLlamaConfig, VilaLlamaForCausalLM, VilaProcessor
    from .registry import use

__all__ = ["VilaLlamaConfig", "VilaLlamaForCausalLM", "VilaProcessor", "use"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, since Hugging Face's classes take seconds to load."""
    if name in __all__:
        return getattr(import_module(".registry" if name == "use" else ".hf.auto", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
