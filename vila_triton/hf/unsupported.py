"""Methods and arguments of Hugging Face's models that `VilaLlamaForCausalLM` cannot honour, each with the reason.

The model is a tree of parameters with pure functions over it, which call no torch module: what stands in the place of
one is read (see `module_reading`) or refused. Its cache is paged, so it cannot take another one.
"""

from typing import Any, NoReturn

import torch


def dict_of_reasons(names: str, reason: str) -> dict[str, str]:
    """Map each of the names, separated by spaces, to the reason."""
    return dict.fromkeys(names.split(), reason)


UNSUPPORTED_ARGUMENTS = {  # of `generate` with transformers' loop
    **dict_of_reasons(
        "cache cache_config cache_implementation max_cache_len past_key_values prefill_chunk_size use_cache",
        "the cache is paged, and made by the model",
    ),
    **dict_of_reasons("inputs inputs_embeds position_ids", "a prompt is input_ids and images"),
    **dict_of_reasons(
        "assistant_model assistant_tokenizer assistant_early_exit assistant_ensemble_weight assistant_lookbehind "
        "assistant_confidence_threshold is_assistant max_matching_ngram_size num_assistant_tokens "
        "num_assistant_tokens_schedule prompt_lookup_num_tokens speculation_type target_lookbehind use_mtp",
        "drafts cannot be taken back from a paged cache here",
    ),
    **dict_of_reasons(
        "custom_generate trust_remote_code penalty_alpha low_memory dola_layers constraints force_words_ids "
        "num_beam_groups diversity_penalty",
        "transformers runs code from elsewhere for it",
    ),
    **dict_of_reasons(
        "guidance_scale negative_prompt_ids negative_prompt_attention_mask",
        "it runs a second prompt, for which there is no cache",
    ),
    **dict_of_reasons("token_healing", "it changes tokens of a prompt whose embeddings are computed already"),
    **dict_of_reasons("output_attentions", "only a whole prompt has them: call the model itself"),
    **dict_of_reasons("seed", "transformers draws from torch's global generator, which torch.manual_seed seeds"),
    **dict_of_reasons("encoder_repetition_penalty encoder_no_repeat_ngram_size", "there is no text encoder"),
}

FROZEN_TREE = "its parameters are a frozen tree, whose sizes are the checkpoint's; change the checkpoint instead"
PEFT = (
    "peft itself adds, loads and saves adapters: `get_peft_model(model, ...)`, `PeftModel.from_pretrained(model, ...)`"
)
OWN_ENGINE = "it has an engine of its own: `generate` takes a batch, `vila-triton serve` whatever requests come"
KERNELS_BY_OP = "kernels are chosen by op: `use(...)`, `vila-triton ops`"
UNSUPPORTED_METHODS = {
    **dict_of_reasons(
        "resize_token_embeddings resize_position_embeddings get_position_embeddings set_input_embeddings "
        "set_output_embeddings set_decoder set_encoder",
        FROZEN_TREE,
    ),
    **dict_of_reasons(
        "add_adapter load_adapter set_adapter delete_adapter enable_adapters disable_adapters active_adapters "
        "get_adapter_state_dict enable_peft_hotswap",
        PEFT,
    ),
    **dict_of_reasons("generate_batch init_continuous_batching continuous_batching_context_manager", OWN_ENGINE),
    **dict_of_reasons("set_attn_implementation set_experts_implementation set_use_kernels", KERNELS_BY_OP),
    **dict_of_reasons("load_custom_generate adjust_generation_fn", "no code that a checkpoint brings is run"),
    **dict_of_reasons("heal_tokens", UNSUPPORTED_ARGUMENTS["token_healing"]),
    **dict_of_reasons("dequantize", "`vila-triton convert SOURCE TARGET --format dense` writes int4 weights out"),
    **dict_of_reasons("push_to_hub", "`save_pretrained` writes a folder, which huggingface_hub's upload_folder sends"),
    **dict_of_reasons("save_distributed_checkpoint prepare_distribute_model", "it runs on one device"),
}


def unsupported_method(name: str, reason: str) -> Any:
    """A method that raises NotImplementedError with the reason."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} has no {name}: {reason}")

    refuse.__name__, refuse.__doc__ = name, f"Not here: {reason}."
    return refuse


UnsupportedMethods = type(
    "Refusing", (), {name: unsupported_method(name, why) for name, why in UNSUPPORTED_METHODS.items()}
)


def check_device_and_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Errors: ValueError for a model on the meta device, or if torch.autocast asks for the other 16-bit dtype."""
    if device.type == "meta":
        raise ValueError("the model is on the meta device, where it has no numbers; load it onto another")
    halves = (torch.float16, torch.bfloat16)
    if dtype in halves and torch.is_autocast_enabled(device.type):
        autocast_dtype = torch.get_autocast_dtype(device.type)
        if autocast_dtype in halves and autocast_dtype != dtype:
            raise ValueError(
                f"the model is in {dtype}, but torch.autocast asks for {autocast_dtype}; load it in {autocast_dtype}"
            )
