"""The model behind the interface of Hugging Face transformers.

auto                       registers the classes with transformers' Auto classes
configuration_vila_llama   `VilaLlamaConfig`
modeling_vila_llama        `VilaLlamaForCausalLM`: loading, saving, `forward`, caches
forward_pass               one forward pass over an unpadded batch
padding                    padded batches to unpadded sequences and back
generation                 `generate`, by the engine or by transformers' loop
processing_vila            `VilaProcessor`
params_module              a tree of parameters as a torch module
unsupported                methods and arguments that are refused, with the reason
chat_model                 a `ChatModel` from a checkpoint folder
"""
