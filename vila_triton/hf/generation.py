"""`generate` of `VilaLlamaForCausalLM`, by our engine or by transformers' own loop over `forward`."""

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

from vila_triton.cache.paged_cache import PagedCache
from vila_triton.engine import engine
from vila_triton.engine.generation_config import ANSWERING, FILE, ignored, settled
from vila_triton.engine.stopping import StopStrings

from ..models import vila
from .padding import pad, require_tensor, side_by_side, unpad
from .unsupported import ARGUMENTS, check_numbers

# What transformers calls it in outputs and in its loop, which changed with its version 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
LOOPS = ("engine", "transformers")
SAMPLING = [name for name in inspect.signature(engine.Sampling.of).parameters if name not in ("rows", "device")]


class VilaGenerationMixin(GenerationMixin):
    """The part of `VilaLlamaForCausalLM` that answers."""

    params: Any
    geometry: Any
    prompt_rules: dict[str, Any]
    new_cache: Any
    features: Any

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
        **how: Any,
    ) -> Any:
        """Answers to a batch of prompts [b, t] (-200 for each picture): the new tokens only, [b, longest].

        Shorter answers are padded with `pad_token_id`, by default the first stop token. What is not said is as in the
        checkpoint's generation_config.json, else at most 128 tokens are made, each the likeliest.

        loop="engine" is ours: `how` are the arguments of `engine.Sampling.of`, but without a `seed` that is drawn from
        torch's random numbers, as transformers' loop draws: `torch.manual_seed` brings an answer back.
        loop="transformers" is `GenerationMixin` with its arguments (beams, `return_dict_in_generate`, ...); a row's
        processors see its words without pictures, padded on the left with the first of them. Greedy answers of both are
        the same.
        Errors: ValueError naming the argument, before any token is made.
        """
        model: Any = self
        check_arguments(loop, how)
        check_numbers(model.device, model.dtype)
        require_tensor("input_ids", input_ids, "tensor of token ids [b, t]")
        if streamer is not None and len(input_ids) != 1:
            raise ValueError(f"a streamer takes one prompt at a time, got {len(input_ids)}")
        features, image_tokens = self.features(images)
        rules: dict[str, Any] = self.prompt_rules | {"max_length": None}  # a prompt that is too long is an error here
        rows = unpad(input_ids.to(model.device), attention_mask, None, None, image_tokens, **rules).rows
        if "eos_token_id" in how:
            given = how["eos_token_id"]
            stops = [given] if isinstance(given, int) else [int(token) for token in (() if given is None else given)]
            how |= {"eos_token_id": stops or None, "pad_token_id": how.get("pad_token_id", (stops or [0])[0])}
        context, longest = self.geometry.llm.max_position_embeddings, max(map(len, rows))
        if loop == "engine":
            how = settled(self.answers(), how, longest, context)
        elif "max_length" not in how and "generation_config" not in how:
            how["max_new_tokens"] = settled(self.answers(), how, longest, context)["max_new_tokens"]
        check_context(rows, how.get("max_new_tokens") or 1, context)
        answer = self._by_engine if loop == "engine" else self._by_transformers
        return answer(rows, features, streamer, chunk_prefilling, how)

    def _by_engine(
        self,
        rows: Sequence[Tensor],
        features: Tensor | None,
        streamer: BaseStreamer | None,
        chunk_prefilling: bool,
        how: dict[str, Any],
    ) -> Tensor:
        model: Any = self
        how = {"eos_token_id": model.generation_config.eos_token_id, **how}
        if how.get("do_sample") and how.get("seed") is None:
            how["seed"] = int(torch.randint(2**32, ()))
        fill = how.pop("pad_token_id", model.generation_config.pad_token_id)
        sampling = engine.Sampling.of(len(rows), device=model.device, **how)
        cache = self.new_cache(len(rows))
        cache.reserve({seq: len(row) + sampling.max_new_tokens for seq, row in enumerate(rows)})
        chunk = model.config.prefill_chunk_size if chunk_prefilling else None
        answers: list[list[int]] = [[] for _ in rows]
        if streamer is not None:
            streamer.put(rows[0][rows[0] >= 0].cpu())
        prompts = dict(enumerate(rows))
        for seq, token in engine.stream(self.params, prompts, self.geometry, cache, features, sampling, chunk):
            answers[seq].append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        longest = max(map(len, answers))
        return torch.tensor([a + [fill] * (longest - len(a)) for a in answers], device=model.device)

    def _by_transformers(
        self,
        rows: Sequence[Tensor],
        features: Tensor | None,
        streamer: BaseStreamer | None,
        chunk_prefilling: bool,
        how: dict[str, Any],
    ) -> Any:
        texts, stopping = how.pop("stop_strings", None), how.pop("stopping_criteria", None)
        if texts is not None:
            stopping = [*(stopping or ()), StopStrings(how.pop("tokenizer", None), texts)]
        words = [row[row >= 0] for row in rows]
        known, places = (side_by_side([len(row) for row in some], "left").to(rows[0].device) for some in (words, rows))
        width = known.shape[1]
        fills = [word[:1] if len(word) else word.new_zeros(1) for word in words]
        ids = torch.stack([torch.cat((fill.expand(width - len(word)), word)) for fill, word in zip(fills, words)])
        theirs: Any = super()
        out = theirs.generate(
            input_ids=ids,  # [b, width]
            attention_mask=known.long(),
            inputs_embeds=pad([vila.embed(self.params, row, features) for row in rows], places),  # [b, t', e]
            position_ids=places.long().cumsum(1).masked_fill(~places, 0) - 1,  # [b, t'], -1 at padding
            streamer=streamer,
            chunk_prefilling=chunk_prefilling,
            stopping_criteria=StoppingCriteriaList(stopping or ()),
            **how,
        )
        if isinstance(out, Tensor):
            return out[:, width:]
        out.sequences = out.sequences[:, width:]
        return out

    def stop_by_default(self, eos: int | list[int] | None) -> None:
        """Make these the stop tokens of both loops, and the first of them the padding."""
        generation: Any = self.generation_config
        generation.eos_token_id = eos
        generation.pad_token_id = eos[0] if isinstance(eos, list) else eos or 0
        generation.prefill_chunk_size = None  # the config's is ours, and not what transformers means by it

    def answer_as(self, said: Mapping[str, Any], where: str) -> None:
        """Answer as a checkpoint's generation_config.json says, and warn of what of it is not honoured."""
        generation: Any = self.generation_config
        known = {name: value for name, value in said.items() if hasattr(generation, name) and name not in ARGUMENTS}
        for name, value in known.items():
            setattr(generation, name, value)
        if "eos_token_id" in known and "pad_token_id" not in known:
            eos = known["eos_token_id"]
            generation.pad_token_id = eos[0] if isinstance(eos, list) else eos
        if beams := ignored(known):
            warnings.warn(
                f"{where}: of {FILE}, {', '.join(beams)} counts in generate(loop='transformers') only", stacklevel=2
            )
        for refused in ignored({name: said[name] for name in said if name in ARGUMENTS}):
            why = ARGUMENTS[refused.partition("=")[0]]
            warnings.warn(f"{where}: of {FILE}, {refused} does not count: {why}", stacklevel=2)

    def answers(self) -> dict[str, Any]:
        """What the model's generation config says beyond its stop tokens, and what is the same in any model."""
        generation: Any = self.generation_config
        return {name: value for name in ANSWERING if (value := getattr(generation, name)) is not None}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes a `PagedCache`

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
        **more: Any,
    ) -> dict[str, Any]:
        """What `forward` gets at each step of transformers' loop: the prompt's embeddings, then one token a row.

        attention_mask is of the words alone; -1 in position_ids [b, t'] is where the embeddings are padded.
        """
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        asked |= {"logits_to_keep": logits_to_keep, "use_cache": True}
        if CACHE in more:
            return {"input_ids": input_ids[:, -1:], "past_key_values": more[CACHE], **asked}
        assert position_ids is not None
        prompt = {"inputs_embeds": inputs_embeds, "attention_mask": position_ids >= 0}
        return {**prompt, "chunk_prefilling": chunk_prefilling, **asked}

    def _update_model_kwargs_for_generation(
        self, outputs: Mapping[str, Any], model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return model_kwargs | {CACHE: outputs[CACHE]}

    def _reorder_cache(self, past_key_values: PagedCache, beam_idx: Tensor) -> PagedCache:
        with past_key_values.lock:
            past_key_values.table.reorder(beam_idx.tolist())
        return past_key_values


def check_arguments(loop: str, how: Mapping[str, Any]) -> None:
    """Errors: ValueError for arguments of `generate` that the loop does not honour."""
    if loop not in LOOPS:
        raise ValueError(f"generate: loop is {loop!r}; there are: {', '.join(LOOPS)}")
    # transformers' loop takes 0 for "not at all".
    engine.check_numbers(how if loop == "engine" else {name: how[name] for name in engine.NUMBERS if how.get(name)})
    if loop == "transformers":
        config = how.get("generation_config")
        asked = {**(config.to_diff_dict() if config else {}), **how}
        for name, value in asked.items():
            if name in ARGUMENTS and (value is not None if name in how else ignored({name: value})):
                raise ValueError(f"generate: loop='transformers' does not honour {name}: {ARGUMENTS[name]}")
    elif unknown := [name for name in how if name not in (*SAMPLING, "pad_token_id")]:
        raise ValueError(
            f"generate: loop='engine' does not know {', '.join(unknown)}, only {', '.join(SAMPLING)}, pad_token_id; "
            "loop='transformers' takes the arguments of transformers' generate"
        )


def check_context(rows: Sequence[Tensor], new: int, limit: int) -> None:
    """Errors: ValueError for a prompt [t] that leaves less than `new` tokens of the context."""
    for i, row in enumerate(rows):
        if len(row) + new > limit:
            raise ValueError(
                f"generate: prompt {i} has {len(row)} positions with its pictures, and {new} more may be generated, "
                f"but the model's context is {limit}; shorten the prompt or lower max_new_tokens"
            )
