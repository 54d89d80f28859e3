"""The model behind the interface of Hugging Face transformers.

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
"""
