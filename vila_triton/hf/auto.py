"""Registers `llava_llama` with transformers' Auto classes when it is imported.

`from vila_triton import VilaLlamaForCausalLM`, or another of the package's Hugging Face names, imports it. Code that
only uses Auto classes, or `pipeline("image-text-to-text")`, must `import vila_triton.auto`. `import vila_triton` alone
does not import it, since the classes take seconds to load.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration_vila_llama import VilaLlamaConfig
from .modeling_vila_llama import VilaLlamaForCausalLM
from .processing_vila import VilaProcessor

__all__ = ["VilaLlamaConfig", "VilaLlamaForCausalLM", "VilaProcessor"]

AutoConfig.register(VilaLlamaConfig.model_type, VilaLlamaConfig)
AutoModelForCausalLM.register(VilaLlamaConfig, VilaLlamaForCausalLM)
AutoModelForImageTextToText.register(VilaLlamaConfig, VilaLlamaForCausalLM)
AutoProcessor.register(VilaLlamaConfig, VilaProcessor)
