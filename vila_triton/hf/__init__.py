"""The interface of Hugging Face transformers: our model behind it, and our ops behind models of theirs.

auto                       registers the classes with transformers' Auto classes
configuration_vila_llama   `VilaLlamaConfig`
modeling_vila_llama        `VilaLlamaForCausalLM`: loading, saving, `forward`, caches
forward_pass               one forward pass over an unpadded batch
padding                    padded batches to unpadded sequences and back
generation                 `generate`, by the engine or by transformers' loop
processing_vila            `VilaProcessor`
params_module              a tree of parameters as a torch module
linear_modules             the modules in it: linear maps, dense and int4, and holders of other parameters
module_reading             what such modules hold, with peft's adapters around them
unsupported                methods and arguments that are refused, with the reason
chat_model                 a `ChatModel` from a checkpoint folder
registration               `install`: what lets models of transformers run on our ops
attention_interface        their attention
int4_quantizer             their linear maps in int4: `Int4Config`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .int4_quantizer import Int4Config
    from .registration import install

__all__ = ["Int4Config", "install"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, since transformers takes seconds to load."""
    if name in __all__:
        return getattr(import_module(".registration", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
