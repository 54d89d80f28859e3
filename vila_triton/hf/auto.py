"""Makes transformers' Auto classes know `llava_llama`, once imported.

`from vila_triton import VilaLlamaForCausalLM` (or another of the package's Hugging Face names) imports it; whoever uses
nothing but `AutoModelForCausalLM` writes `import vila_triton.hf.auto`. `import vila_triton` alone does not, so that it
stays instant: the classes take seconds to load.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from .configuration_vila_llama import VilaLlamaConfig
from .modeling_vila_llama import VilaLlamaForCausalLM
from .processing_vila import VilaProcessor

__all__ = ["VilaLlamaConfig", "VilaLlamaForCausalLM", "VilaProcessor"]

AutoConfig.register(VilaLlamaConfig.model_type, VilaLlamaConfig)
AutoModelForCausalLM.register(VilaLlamaConfig, VilaLlamaForCausalLM)
AutoProcessor.register(VilaLlamaConfig, VilaProcessor)
