"""VILA with int4 weights, chunked prefill and a paged KV cache, on Triton kernels that can be swapped and tested."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.paged_tensors import PagedCache
    from .hf.auto import VilaLlamaConfig, VilaLlamaForCausalLM, VilaProcessor
    from .registry import use

__all__ = ["PagedCache", "VilaLlamaConfig", "VilaLlamaForCausalLM", "VilaProcessor", "use"]
_LIGHT = {"PagedCache": ".cache.paged_tensors", "use": ".registry"}  # the others need Hugging Face's classes


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, since Hugging Face's classes take seconds to load."""
    if name in __all__:
        return getattr(import_module(_LIGHT.get(name, ".hf.auto"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
