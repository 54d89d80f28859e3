"""Makes transformers' Auto classes know `llava_llama`, once imported.

`from vila_triton import VilaLlamaForCausalLM` (or another of the package's Hugging Face names) imports it; whoever uses
nothing but `AutoModelForCausalLM` writes `import vila_triton.auto`. `import vila_triton` alone does not, so that it
stays instant: the classes take seconds to load.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from .models.vila_llama import VilaLlamaForCausalLM
from .models.vila_llama_config import VilaLlamaConfig
from .processor import VilaProcessor

__all__ = ["VilaLlamaConfig", "VilaLlamaForCausalLM", "VilaProcessor"]

AutoConfig.register(VilaLlamaConfig.model_type, VilaLlamaConfig)
AutoModelForCausalLM.register(VilaLlamaConfig, VilaLlamaForCausalLM)
AutoProcessor.register(VilaLlamaConfig, VilaProcessor)
