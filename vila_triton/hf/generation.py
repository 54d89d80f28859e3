"""`generate` of `VilaLlamaForCausalLM`: our engine, or transformers' own loop over `forward`."""

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.checkpoints.generation_config import (
    ARGUMENT_LIMITS,
    GENERATION_CONFIG_NAME,
    HONORED_FIELDS,
    NEUTRAL_VALUES,
    SAMPLING_FIELDS,
    ignored_settings,
    sampling_arguments,
)
from vila_triton.engine import engine
from vila_triton.engine.sampling import NEEDS_SAMPLING, SamplingParams, check_sampling_arguments
from vila_triton.engine.stopping import PadStoppedRows, StopStrings

from ..models import vila
from .padding import pad, require_tensor, token_mask, unpad
from .unsupported import UNSUPPORTED_ARGUMENTS, check_device_and_dtype

# The name of the cache in transformers' outputs and loop, which changed with version 5.24.
CACHE_KEY = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
LOOPS = ("engine", "transformers")
LENGTH_FIELDS = {"max_new_tokens", "max_length"}
SAMPLING_ARGUMENTS = [
    name for name in inspect.signature(SamplingParams.from_generate_kwargs).parameters if name != "batch_size"
]


class VilaGenerationMixin(GenerationMixin):
    """The methods of `VilaLlamaForCausalLM` that generate text."""

    params: Any
    vila_config: Any
    padding_config: dict[str, Any]
    new_cache: Any
    image_features: Any

    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        images: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        streamer: BaseStreamer | None = None,
        chunk_prefilling: bool = False,
        *,
        loop: str = "engine",
        **options: Any,
    ) -> Any:
        """Generate answers to a batch of prompts [b, t], -200 for each image -> the new tokens only, [b, longest].

        Shorter answers are padded with `pad_token_id`, by default the first stop token. Defaults are those of the
        checkpoint's generation_config.json, else greedy decoding of at most 128 tokens.
        `loop="engine"` is ours: `options` are the arguments of `SamplingParams.from_generate_kwargs`. Without `seed`
        one is drawn from torch's global generator, so that `torch.manual_seed` repeats an answer, as with transformers.
        `loop="transformers"` is `GenerationMixin` with its arguments (beams, `return_dict_in_generate`, ...). Its
        logits processors see the text tokens of a sequence without images, padded on the left with the first of them.
        Greedy answers of both loops are the same.
        Errors: ValueError naming the argument, before any token is generated.
        """
        model: Any = self
        if loop == "engine" and not options.get("return_dict_in_generate", True):
            del options["return_dict_in_generate"]  # as pipelines say, and as it is
        check_generate_arguments(loop, options)
        check_device_and_dtype(model.device, model.dtype)
        require_tensor("input_ids", input_ids, "tensor of token ids [b, t]")
        if streamer is not None and len(input_ids) != 1:
            raise ValueError(f"a streamer takes one prompt at a time, got {len(input_ids)}")
        image_features, tokens_per_image = self.image_features(images)
        unpad_options: dict[str, Any] = self.padding_config | {"max_length": None}  # long prompts are errors here
        rows = unpad(input_ids.to(model.device), attention_mask, None, None, tokens_per_image, **unpad_options).rows
        if "eos_token_id" in options:
            eos = options["eos_token_id"]
            stop_ids = [eos] if isinstance(eos, int) else [int(token) for token in (() if eos is None else eos)]
            options |= {
                "eos_token_id": stop_ids or None,
                "pad_token_id": options.get("pad_token_id", (stop_ids or [0])[0]),
            }
        context_length, prompt_length = self.vila_config.llm.max_position_embeddings, max(map(len, rows))
        settings = self.generation_settings()
        if loop == "engine":
            options = sampling_arguments(settings, options, prompt_length, context_length)
            new_tokens = options["max_new_tokens"]
        else:
            given = explicit_settings(options)
            check_sampling_fields(settings | given, given)
            lengths = given if LENGTH_FIELDS & given.keys() else settings
            new_tokens = sampling_arguments(lengths, {}, prompt_length, context_length)["max_new_tokens"]
            options = with_new_tokens(options, new_tokens)
        check_context_length(rows, new_tokens, context_length)
        generate_rows = self._generate_engine if loop == "engine" else self._generate_transformers
        return generate_rows(rows, image_features, streamer, chunk_prefilling, options)

    def _generate_engine(
        self,
        rows: Sequence[Tensor],
        image_features: Tensor | None,
        streamer: BaseStreamer | None,
        chunk_prefilling: bool,
        options: dict[str, Any],
    ) -> Tensor:
        model: Any = self
        options = {"eos_token_id": model.generation_config.eos_token_id, **options}
        if options.get("do_sample") and options.get("seed") is None:
            options["seed"] = int(torch.randint(2**32, ()))
        pad_id = options.pop("pad_token_id", model.generation_config.pad_token_id)
        sampling = SamplingParams.from_generate_kwargs(len(rows), **options)
        cache = self.new_cache(len(rows))
        cache.ensure_capacity({seq: len(row) + sampling.max_new_tokens for seq, row in enumerate(rows)})
        chunk_size = model.config.prefill_chunk_size if chunk_prefilling else None
        answers: list[list[int]] = [[] for _ in rows]
        if streamer is not None:
            streamer.put(rows[0][rows[0] >= 0].cpu())
        prompts = dict(enumerate(rows))
        for seq, token in engine.generate_tokens(
            self.params, prompts, self.vila_config, cache, image_features, sampling, chunk_size
        ):
            answers[seq].append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        longest = max(map(len, answers))
        return torch.tensor([a + [pad_id] * (longest - len(a)) for a in answers], device=model.device)

    def _generate_transformers(
        self,
        rows: Sequence[Tensor],
        image_features: Tensor | None,
        streamer: BaseStreamer | None,
        chunk_prefilling: bool,
        options: dict[str, Any],
    ) -> Any:
        stop_strings, stopping_criteria = options.pop("stop_strings", None), options.pop("stopping_criteria", None)
        if stop_strings is not None:
            stopping_criteria = [*(stopping_criteria or ()), StopStrings(options.pop("tokenizer", None), stop_strings)]
        text_rows = [row[row >= 0] for row in rows]
        text_mask, row_mask = (
            token_mask([len(row) for row in batch_rows], "left").to(rows[0].device) for batch_rows in (text_rows, rows)
        )
        width = text_mask.shape[1]
        pad_ids = [text[:1] if len(text) else text.new_zeros(1) for text in text_rows]
        ids = torch.stack([torch.cat((pad.expand(width - len(row)), row)) for pad, row in zip(pad_ids, text_rows)])
        embeddings = vila.embed_spliced(self.params, torch.cat(list(rows)), image_features)
        parent: Any = super()
        output = parent.generate(
            input_ids=ids,  # [b, width]
            attention_mask=text_mask.long(),
            inputs_embeds=pad(embeddings, row_mask),  # [b, t', e]
            position_ids=row_mask.long().cumsum(1).masked_fill(~row_mask, 0) - 1,  # [b, t'], -1 at padding
            streamer=streamer,
            chunk_prefilling=chunk_prefilling,
            stopping_criteria=StoppingCriteriaList([*(stopping_criteria or ()), PadStoppedRows()]),
            **options,
        )
        if isinstance(output, Tensor):
            return output[:, width:]
        output.sequences = output.sequences[:, width:]
        return output

    def set_default_stop_tokens(self, eos_token_id: int | list[int] | None) -> None:
        """Set the stop tokens of both loops, and the first of them as padding."""
        config: Any = self.generation_config
        config.eos_token_id = eos_token_id
        config.pad_token_id = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id or 0
        config.prefill_chunk_size = None  # transformers means something else by it than our config

    def apply_generation_config(self, values: Mapping[str, Any], source: str) -> None:
        """Take over the values of a checkpoint's generation_config.json, and warn of those that are not honoured."""
        config: Any = self.generation_config
        supported = {
            name: value for name, value in values.items() if hasattr(config, name) and name not in UNSUPPORTED_ARGUMENTS
        }
        for name, value in supported.items():
            setattr(config, name, value)
        if "eos_token_id" in supported and "pad_token_id" not in supported:
            eos = supported["eos_token_id"]
            config.pad_token_id = eos[0] if isinstance(eos, list) else eos
        if beam_settings := ignored_settings(supported):
            warnings.warn(
                f"{source}: of {GENERATION_CONFIG_NAME}, {', '.join(beam_settings)} counts in "
                "generate(loop='transformers') only",
                stacklevel=2,
            )
        for setting in ignored_settings({name: values[name] for name in values if name in UNSUPPORTED_ARGUMENTS}):
            reason = UNSUPPORTED_ARGUMENTS[setting.partition("=")[0]]
            warnings.warn(f"{source}: of {GENERATION_CONFIG_NAME}, {setting} does not count: {reason}", stacklevel=2)

    def generation_settings(self) -> dict[str, Any]:
        """The values of the model's generation config that both loops honour, without the stop tokens."""
        config: Any = self.generation_config
        return {name: value for name in HONORED_FIELDS if (value := getattr(config, name)) is not None}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes a `PagedKVCache`

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        chunk_prefilling: bool = False,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` at each step of transformers' loop: the prompt's embeddings first, then one token
        per sequence.

        attention_mask covers the text tokens only; position_ids [b, t'] are -1 where the embeddings are padded.
        """
        forward_options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        forward_options |= {"logits_to_keep": logits_to_keep, "use_cache": True}
        if CACHE_KEY in kwargs:
            return {"input_ids": input_ids[:, -1:], "past_key_values": kwargs[CACHE_KEY], **forward_options}
        assert position_ids is not None
        prompt = {"inputs_embeds": inputs_embeds, "attention_mask": position_ids >= 0}
        return {**prompt, "chunk_prefilling": chunk_prefilling, **forward_options}

    def _update_model_kwargs_for_generation(
        self, outputs: Mapping[str, Any], model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return model_kwargs | {CACHE_KEY: outputs[CACHE_KEY]}

    def _reorder_cache(self, past_key_values: PagedKVCache, beam_idx: Tensor) -> PagedKVCache:
        with past_key_values.lock:
            past_key_values.allocator.reorder(beam_idx.tolist())
        return past_key_values


def check_generate_arguments(loop: str, options: Mapping[str, Any]) -> None:
    """Errors: ValueError for arguments of `generate` that the loop does not honour."""
    if loop not in LOOPS:
        raise ValueError(f"generate: loop is {loop!r}; there are: {', '.join(LOOPS)}")
    # transformers' loop takes 0 for "not at all".
    check_sampling_arguments(
        options if loop == "engine" else {name: options[name] for name in ARGUMENT_LIMITS if options.get(name)}
    )
    if loop == "transformers":
        config = options.get("generation_config")
        arguments = {**(config.to_diff_dict() if config else {}), **options}
        for name, value in arguments.items():
            if name in UNSUPPORTED_ARGUMENTS and (
                value is not None if name in options else ignored_settings({name: value})
            ):
                raise ValueError(f"generate: loop='transformers' does not honour {name}: {UNSUPPORTED_ARGUMENTS[name]}")
    elif unknown := [name for name in options if name not in (*SAMPLING_ARGUMENTS, "pad_token_id")]:
        raise ValueError(
            f"generate: loop='engine' does not know {', '.join(unknown)}, only {', '.join(SAMPLING_ARGUMENTS)}, "
            "pad_token_id; loop='transformers' takes the arguments of transformers' generate"
        )


def explicit_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `HONORED_FIELDS` that a call gives as arguments or else in its generation_config; if it says how
    long an answer may be in both, the argument.
    """
    arguments, config = (
        {name: value for name in HONORED_FIELDS if (value := get(name)) is not None}
        for get in (options.get, lambda name: getattr(options.get("generation_config"), name, None))
    )
    both = LENGTH_FIELDS if LENGTH_FIELDS & arguments.keys() else set()
    return {name: value for name, value in config.items() if name not in both} | arguments


def check_sampling_fields(settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Errors: ValueError if a call gives what counts in sampling only, and the settings do not say do_sample."""
    changed = [name for name in SAMPLING_FIELDS if given.get(name, NEUTRAL_VALUES[name]) != NEUTRAL_VALUES[name]]
    if changed and not settings.get("do_sample"):
        raise ValueError(NEEDS_SAMPLING)


def with_new_tokens(options: Mapping[str, Any], new_tokens: int) -> dict[str, Any]:
    """The arguments of transformers' `generate` with this limit of an answer in place of what they say of its length.

    Of a max_length transformers would take the positions of images twice.
    """
    length = {"max_new_tokens": new_tokens, "max_length": None}
    others = {name: value for name, value in options.items() if name not in length}
    if (config := options.get("generation_config")) is None:
        return others | length
    config = copy.deepcopy(config)
    config.update(**length)
    return others | {"generation_config": config}


def check_context_length(rows: Sequence[Tensor], new_tokens: int, context_length: int) -> None:
    """Errors: ValueError for a prompt [t] that leaves fewer than `new_tokens` positions of the context."""
    for i, row in enumerate(rows):
        if len(row) + new_tokens > context_length:
            raise ValueError(
                f"generate: prompt {i} has {len(row)} positions with its images, and {new_tokens} more may be "
                f"generated, but the model's context is {context_length}; shorten the prompt or lower max_new_tokens"
            )
