"""All that is inherited from Hugging Face: each way works, or is one sentence that says what and why."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_reference import build, pictures
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    ProcessorMixin,
    pipeline,
)
from transformers.cli.serving.model_manager import ModelManager

from vila_triton import VilaLlamaForCausalLM, VilaProcessor
from vila_triton.checkpoints.generation_config import SAMPLING_FIELDS
from vila_triton.hf.unsupported import UNSUPPORTED_ARGUMENTS, UNSUPPORTED_METHODS
from vila_triton.models.config import ConfigError, LlamaConfig
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.examples import EXAMPLES_DIR

MODEL: Any = build()
IDS = torch.tensor([[1, 5, 6, 9]])
HUGGING_FACES = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__} - {*torch.nn.Module.__mro__}

# What transformers' loops and loaders call themselves, and nobody else.
INNER = """add_model_tags barrier_after_gathered_checkpoint_save can_generate generation_config_class get_compiled_call
    get_correct_attn_implementation get_correct_experts_implementation get_expanded_tied_weights_keys get_init_context
    get_experts_implementation get_parameter_or_buffer init_parallel_plans init_weights initialize_weights
    is_backend_compatible is_custom_code is_remote_code mark_tied_weights_as_initialized maybe_distribute_model
    gather_sharded_state_dict_for_save destroy_cached_continuous_batching_manager named_non_persistent_buffers post_init
    register_for_auto_class retrieve_modules_from_names should_save_on_this_rank config_class get_decoder get_encoder
    warn_if_padding_and_no_attention_mask prepare_inputs_for_generation disable_input_require_grads
    gradient_checkpointing_disable activation_checkpointing_disable enable_input_require_grads
    gradient_checkpointing_enable activation_checkpointing_enable"""
INNER_OF_PROCESSOR = """check_argument_for_proper_class create_mm_token_type_ids from_args_and_dict get_attributes
    get_possibly_dynamic_module get_processor_dict get_text_with_replacements prepare_inputs_layout replace_audio_token
    replace_image_token replace_video_token validate_init_kwargs validate_inputs register_for_auto_class
    valid_processor_kwargs apply_chat_template from_pretrained save_pretrained decode batch_decode to_dict to_json_file
    to_json_string post_process_image_text_to_text"""
WORKS: dict[str, Callable[[Any], Any]] = {
    "generate": lambda model: model.generate(IDS, max_new_tokens=1),
    "forward": lambda model: model(IDS),
    "compute_transition_scores": lambda model: model.compute_transition_scores(IDS[:, :1], (torch.zeros(1, 61),)),
    "num_parameters": lambda model: model.num_parameters(),
    "get_memory_footprint": lambda model: model.get_memory_footprint(),
    "get_input_embeddings": lambda model: model.get_input_embeddings()(IDS),
    "get_output_embeddings": lambda model: model.get_output_embeddings()(torch.zeros(1, 32, dtype=torch.float64)),
    "to": lambda model: copy.deepcopy(model).to(torch.float32)(IDS),
    "half": lambda model: copy.deepcopy(model).half()(IDS),
    "float": lambda model: copy.deepcopy(model).float()(IDS),
    "train": lambda model: copy.deepcopy(model).train()(IDS, labels=IDS).loss.backward(),
    "eval": lambda model: model.eval(),
    "tie_weights": lambda model: model.tie_weights(),
    **dict.fromkeys(("save_pretrained", "from_pretrained", "cuda"), lambda model: None),  # in files of their own
}


def test_inherited_methods_work_or_raise_with_a_reason() -> None:
    names = {name for cls in HUGGING_FACES for name in vars(cls) if not name.startswith("_")}
    names = {name for name in names if callable(getattr(VilaLlamaForCausalLM, name, None))}
    assert not names - {*INNER.split(), *WORKS, *UNSUPPORTED_METHODS}, (
        "a method of transformers that nobody has looked at"
    )
    for call in WORKS.values():
        call(MODEL)
    for name in UNSUPPORTED_METHODS.keys() & names:
        with pytest.raises(NotImplementedError, match=f"^VilaLlamaForCausalLM has no {name}: "):
            getattr(MODEL, name)()


def test_generate_arguments_work_or_raise_with_a_reason() -> None:
    def everything(name: str) -> dict[str, Any]:
        sampling = {"do_sample": True} if name in SAMPLING_FIELDS else {}
        return {"max_new_tokens": 2, "loop": "transformers", **sampling, name: VALUES[name]}

    neutral = {"transformers_version", "forced_bos_token_id", "decoder_start_token_id", "bos_token_id", "max_length"}
    neutral |= {"compile_config", "disable_compile", "continuous_batching_config", "max_new_tokens"}
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - neutral
    assert not names - {*VALUES, *UNSUPPORTED_ARGUMENTS}, "an argument of transformers that nobody has looked at"
    for name in VALUES:
        assert MODEL.generate(IDS, **everything(name)) is not None
    for name in UNSUPPORTED_ARGUMENTS:
        with pytest.raises(
            ValueError, match=f"loop=.transformers. does not honour {name}: {UNSUPPORTED_ARGUMENTS[name][:20]}"
        ):
            MODEL.generate(IDS, loop="transformers", **{name: 3})
    how: Any = GenerationConfig(max_new_tokens=2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="does not honour guidance_scale"):
        MODEL.generate(IDS, loop="transformers", generation_config=how)


VALUES: dict[str, Any] = {
    **{"do_sample": True, "num_beams": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "top_h": 0.4},
    **{"typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "repetition_penalty": 1.2, "length_penalty": 2.0},
    **{"no_repeat_ngram_size": 2, "bad_words_ids": [[3]], "renormalize_logits": True, "forced_eos_token_id": 3},
    **{"remove_invalid_values": True, "exponential_decay_length_penalty": (1, 1.1), "suppress_tokens": [4]},
    **{"begin_suppress_tokens": [4], "sequence_bias": {(5,): 1.0}, "watermarking_config": {"bias": 2.0}},
    **{"num_return_sequences": 1, "output_hidden_states": True, "output_scores": True, "output_logits": True},
    **{"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": 7, "min_length": 3, "min_new_tokens": 1},
    **{"early_stopping": True, "max_time": 10.0, "stop_strings": None},
}


def autocast(ours: torch.dtype, asked: torch.dtype) -> Any:
    model = copy.deepcopy(MODEL).to(ours)
    with torch.autocast("cpu", dtype=asked):
        return model(torch.tensor([[1, -200, 5]]), images=pictures(model, 1)).logits


def test_autocast_to_the_other_half_dtype_is_refused_and_others_run() -> None:
    halves, both = (torch.float16, torch.bfloat16), "the model is in torch.{}, but torch.autocast asks for torch.{}"
    for ours in (*halves, torch.float32):
        for asked in halves:
            if ours in halves and ours != asked:
                message = both.format(str(ours)[6:], str(asked)[6:])
                with pytest.raises(ValueError, match=message):
                    autocast(ours, asked)
                with pytest.raises(ValueError, match=message), torch.autocast("cpu", dtype=asked):
                    copy.deepcopy(MODEL).to(ours).generate(IDS)
            else:
                assert autocast(ours, asked).isfinite().all()


def test_mixed_dtypes_and_meta_device_are_refused() -> None:
    mixed = copy.deepcopy(MODEL)
    mixed.vision_tower.to(torch.float16)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match=r"vision_tower is in torch.float16, .* need all parts in one dtype"):
        mixed(torch.tensor([[1, -200]]), images=pictures(MODEL, 1))
    with pytest.raises(ValueError, match="the model is on the meta device"):
        copy.deepcopy(MODEL).to("meta")(IDS)


def test_embedding_and_head_modules_share_the_parameters() -> None:
    table: Any = MODEL.get_input_embeddings()
    assert table.weight is MODEL.get_parameter("llm.model.embed_tokens.weight")
    head: Any = MODEL.get_output_embeddings()
    last = MODEL(IDS, output_hidden_states=True)
    torch.testing.assert_close(head(last.hidden_states[-1]), last.logits)


LLAMA = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def test_rope_scaling_without_type_is_refused() -> None:
    for rope in ({"factor": 2.0}, {"factor": 2.0, "rope_theta": 5.0}, {"type": None, "factor": 4.0}):
        for key in ("rope_scaling", "rope_parameters"):
            with pytest.raises(
                ConfigError, match="rope_scaling has factor, but no rope_type, expected linear or llama3"
            ):
                LlamaConfig.from_dict({**LLAMA, key: rope})
    for rope in (None, {}, {"rope_theta": 5.0}, {"rope_type": "default"}, {"type": "linear", "factor": 2.0}):
        LlamaConfig.from_dict({**LLAMA, "rope_scaling": rope})


def test_processor_methods_work_or_raise_with_a_reason() -> None:
    processor: Any = VilaProcessor.from_pretrained(BUNDLED_CHECKPOINT)
    refused = {"push_to_hub", "parse_response", "post_process_multimodal_output"}
    names = {name for name in vars(ProcessorMixin) if not name.startswith("_")}
    names = {name for name in names if callable(getattr(ProcessorMixin, name))}
    assert not names - refused - {*INNER_OF_PROCESSOR.split()}, "a method of transformers that nobody has looked at"
    ids = processor(text="What colour is it?")["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == processor.batch_decode(ids, skip_special_tokens=True)
    assert "conversation_template" in processor.to_json_string()
    for name in refused & names:
        with pytest.raises(NotImplementedError, match=f"^VilaProcessor has no {name}: "):
            getattr(processor, name)("x")


def test_pipeline_of_images_and_text_answers() -> None:
    image = str(EXAMPLES_DIR / "a.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "How many blue shapes are there?"}]
    chat = [{"role": "user", "content": content}]
    answerer: Any = pipeline("image-text-to-text", model=str(BUNDLED_CHECKPOINT))
    assert type(answerer.model) is VilaLlamaForCausalLM
    assert type(AutoModelForImageTextToText.from_pretrained(BUNDLED_CHECKPOINT)) is VilaLlamaForCausalLM
    how = {"text": chat, "max_new_tokens": 8, "return_full_text": False}
    if hasattr(answerer, "_prepare_generate_kwargs"):
        assert answerer(**how)[0]["generated_text"] == "2"
    else:  # before 5.24 a pipeline gives a config of everything, with settings that the engine does not honour
        with pytest.raises(ValueError, match="loop='engine' does not know generation_config"):
            answerer(**how)


def test_server_of_transformers_is_refused_in_one_sentence() -> None:
    server = ModelManager(device="cpu")
    with pytest.raises(
        NotImplementedError, match=r"^`transformers serve` .*; `vila-triton serve FOLDER` serves this one$"
    ):
        server.load_model_and_processor(server.process_model_name(str(BUNDLED_CHECKPOINT)))
