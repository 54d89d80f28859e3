"""`VilaLlamaForCausalLM`: the functional model behind the interface of Hugging Face."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vila_triton.cache.paged_cache import AttentionRecorder, PagedKVCache, UncachedBatch, resolve_past
from vila_triton.checkpoints import loading
from vila_triton.checkpoints.generation_config import GENERATION_CONFIG_NAME
from vila_triton.device import pick_device
from vila_triton.engine import engine

from ..models import llama, vila
from ..models.config_fields import name_folder_in_errors
from ..models.params import init_tree, write_counts
from .configuration_vila_llama import AUTO_CLASS_ARGUMENTS, VilaLlamaConfig, parse_dtype
from .generation import CACHE_KEY, VilaGenerationMixin
from .padding import causal_loss, pad, pad_attentions, require_tensor, unpad
from .params_module import ParamsModule
from .unsupported import UnsupportedMethods, check_device_and_dtype


class VilaLlamaForCausalLM(UnsupportedMethods, PreTrainedModel, VilaGenerationMixin):
    """VILA: `.vision_tower` and `.mm_projector` turn pictures into positions of `.llm`, which answers."""

    config_class = VilaLlamaConfig
    config: VilaLlamaConfig
    base_model_prefix = ""

    def __init__(self, config: VilaLlamaConfig):
        super().__init__(config)
        self.init_vlm(config)
        self.post_init()

    @torch.inference_mode(False)  # else nobody could train them, nor see that they were written to
    def init_vlm(self, config: VilaLlamaConfig, params: vila.Vila | None = None) -> None:
        """Build the three parts, with random parameters unless they are given; a model that has a part keeps it."""
        if any(hasattr(self, part) for part in loading.PARTS):
            return
        if getattr(config, "model_dtype", None) is None:
            warnings.warn("model_dtype not found in config, defaulting to torch.float16.", stacklevel=2)
            config.model_dtype = "torch.float16"
        part_configs = config.part_configs()
        self.vila_config = loading.build_vila_config(config.to_dict(), part_configs)
        for part in loading.PARTS:
            setattr(config, f"{part}_cfg", part_configs[part])
        config.vocab_size = self.vila_config.llm.vocab_size
        specs = vila.param_specs(self.vila_config, parse_dtype(config.model_dtype))
        params = init_tree(specs) if params is None else params
        for part in loading.PARTS:
            self.add_module(part, ParamsModule(getattr(specs, part), getattr(params, part)))
        self.padding_config = {
            "vocab_size": self.vila_config.llm.vocab_size,
            "max_length": part_configs["llm"].get("tokenizer_model_max_length"),
            "padding_side": part_configs["llm"].get("tokenizer_padding_side") or "right",
        }
        self.set_default_stop_tokens(part_configs["llm"].get("eos_token_id"))
        self.cache: PagedKVCache | None = None

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        folder: str | Path,
        *,
        config: VilaLlamaConfig | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> "VilaLlamaForCausalLM":
        """Load a VILA folder onto a device (default: the GPU if there is one) in a dtype (default, and "auto": the
        config's), with its own config or another.

        Errors: `LoadError` naming every tensor that does not fit, `ConfigError` for a config we cannot honour,
        TypeError for other arguments.
        """
        if unknown := [name for name in kwargs if name not in AUTO_CLASS_ARGUMENTS]:
            raise TypeError(f"from_pretrained takes config, device and dtype, and not {', '.join(unknown)}")
        top_config, part_configs = loading.read_configs(Path(folder))
        if config is not None and not isinstance(config, VilaLlamaConfig):
            raise TypeError(f"config is a {type(config).__name__}, expected a VilaLlamaConfig")
        if config is not None:
            top_config = config.to_dict()
        with name_folder_in_errors(Path(folder)):
            cfg = loading.build_vila_config(top_config, part_configs)
            config = VilaLlamaConfig.from_configs(top_config, part_configs)
            config._name_or_path = str(folder)
            if dtype not in (None, "auto"):
                config.model_dtype = str(dtype)
            model_dtype = getattr(config, "model_dtype", None)
            params_dtype = parse_dtype("torch.float16" if model_dtype is None else model_dtype)
        params = loading.load_params(Path(folder), cfg, params_dtype, pick_device(str(device) if device else None))
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        model.init_vlm(config, params)
        model.post_init()
        model.apply_generation_config(loading.load_generation_config(Path(folder), cfg.llm.vocab_size), str(folder))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write a VILA folder that `from_pretrained` reads back to the same bits, with the tokenizer it came with."""
        top_config = {k: v for k, v in self.config.to_diff_dict().items() if not k.endswith("_cfg")}
        top_config |= {"architectures": [type(self).__name__], "model_dtype": str(self.dtype)}
        source = Path(self.config._name_or_path) if self.config._name_or_path else None
        tokenizer_source = source if source and source.is_dir() else None
        loading.save_checkpoint(Path(folder), top_config, self.config.part_configs(), self.params, tokenizer_source)
        settings, eos = self.generation_settings(), getattr(self.generation_config, "eos_token_id", None)
        if settings or eos != self.config.part_configs()["llm"].get("eos_token_id"):
            loading.write_json(Path(folder) / GENERATION_CONFIG_NAME, {**settings, "eos_token_id": eos})

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """The embeddings of words as a torch module, which holds the model's own parameter."""
        weight: Any = self.params.llm.embedding
        module = torch.nn.Embedding(*weight.shape, device="meta")
        module.weight = weight
        return module

    def get_output_embeddings(self) -> torch.nn.Linear:
        """The head as a torch module, which holds the model's own parameter."""
        llm: Any = self.params.llm
        weight = llm.embedding if llm.head is None else llm.head
        head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = weight
        return head

    @property
    def params(self) -> vila.Vila:
        """The parameters as the tree that the functional model takes."""
        return vila.Vila(*(getattr(self, part).params for part in loading.PARTS))

    def encode_images(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Pictures [n, c, H, W] (or [b, n, c, H, W], or a list of either or of [c, H, W]) -> [n, tokens, e]."""
        for x in images if isinstance(images, (list, tuple)) else [images]:
            require_tensor("images", x, "tensor of pixels")
        if not isinstance(images, Tensor):
            images = torch.cat([x if x.ndim == 4 else x[None] for x in images])
        images = images.flatten(0, 1) if images.ndim == 5 else images
        dtypes = {
            part: next(x.dtype for x in getattr(self, part).parameters() if x.is_floating_point())
            for part in loading.PARTS
        }
        if len(set(dtypes.values())) > 1:
            listing = ", ".join(f"{part} is in {dtype}" for part, dtype in dtypes.items())
            raise ValueError(f"{listing}; pictures need all parts in one dtype: model.to(dtype)")
        images, numerics = images.to(self.device, self.dtype), self.config.attention_policy
        return engine.encode_images(self.params, images, self.vila_config, numerics)

    def image_features(self, images: Tensor | Sequence[Tensor] | None) -> tuple[Tensor | None, list[int]]:
        """Features of all pictures end to end [rows, e], and how many of them each picture has."""
        if images is None or (isinstance(images, (list, tuple)) and not images):
            return None, []
        image_features = self.encode_images(images)
        return image_features.flatten(0, 1), [image_features.shape[1]] * len(image_features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        start_pos: int | Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        return_dict: bool | None = None,
        special_token: bool = False,
        chunk_prefilling: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [b, t, v] of every position given, pictures widened; 0 at padding.

        input_ids [b, t] with -200 for each picture of `images`, or inputs_embeds [b, t, e]. The cache is
        `past_key_values` (one sequence a row), or with `start_pos` the model's own, continued from there: 0 starts
        afresh, less than what is cached rolls back (a number for all rows, or one each). Neither: a new one. With
        `use_cache=False` the past is read but nothing is added to it. `chunk_prefilling` runs at most
        `config.prefill_chunk_size` tokens of a row at a time. `logits_to_keep=n` returns the last n positions only.
        Errors: ValueError naming the argument, before anything is changed.
        """
        check_device_and_dtype(self.device, self.dtype)
        output_attentions = output_attentions if output_attentions is not None else self.config.output_attentions
        wants_hidden_states = (
            output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        )
        one_pass = not chunk_prefilling
        for name, x in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)):
            if x is not None:
                require_tensor(name, x, "tensor [b, t] of ids or [b, t, e] of embeddings")
        for fine, message in (
            (not special_token, "special_token=True means nothing to this model; leave it False"),
            ((input_ids is None) != (inputs_embeds is None), "exactly one of input_ids and inputs_embeds is needed"),
            (images is None or inputs_embeds is None, "images go into input_ids; inputs_embeds have them already"),
            (input_ids is None or not input_ids.is_floating_point(), "input_ids must be whole numbers"),
            (inputs_embeds is None or inputs_embeds.is_floating_point(), "inputs_embeds must not be whole numbers"),
            (isinstance(logits_to_keep, int) and logits_to_keep >= 0, "logits_to_keep must be 0 (all) or a count"),
            (one_pass or (self.config.prefill_chunk_size or 0) >= 1, "config.prefill_chunk_size must be at least 1"),
            (labels is None or not logits_to_keep, "labels need all logits, but logits_to_keep is set"),
            (one_pass or not output_attentions, "output_attentions needs one pass; chunk_prefilling makes many"),
            (one_pass or not wants_hidden_states, "output_hidden_states needs one pass; chunk_prefilling makes many"),
        ):
            if not fine:
                raise ValueError(message)
        inputs: Tensor = input_ids if input_ids is not None else inputs_embeds  # pyright: ignore
        use_cache = bool(getattr(self.config, "use_cache", True) if use_cache is None else use_cache)
        image_features, tokens_per_image = self.image_features(images)
        cache, context_lens = resolve_past(self.cache, past_key_values, start_pos, len(inputs))
        if cache:
            self.check_cache(cache, any(context_lens))
        if output_attentions and any(context_lens):
            raise ValueError("output_attentions needs the whole sequence in one pass, but part of it is cached already")
        batch = unpad(
            inputs.to(self.device),
            attention_mask,
            position_ids,
            labels,
            tokens_per_image,
            context_lens=context_lens,
            **self.padding_config,
        )
        # Under "invariant" keys are seen as pages hold them, also where none are kept.
        if cache is None and (use_cache or chunk_prefilling or self.config.attention_policy == "invariant"):
            cache = self.new_cache(len(inputs))
        mask = batch.mask[:, -logits_to_keep:]
        num_kept = mask.sum(1).tolist()
        hidden_states: list[Tensor] | None = [] if wants_hidden_states else None
        recorder: AttentionRecorder | None = None
        lock = cache.lock if cache else nullcontext()
        with (
            lock,
            cache.roll_back(context_lens, in_place=use_cache)
            if cache
            else nullcontext(range(len(context_lens))) as sequences,
        ):
            counts = {seq: len(row) for seq, row in zip(sequences, batch.rows)}
            if cache:
                cache.ensure_capacity(counts)
            uncached = UncachedBatch(list(counts.values()), self.device, self.config.attention_policy)
            if cache and chunk_prefilling:
                hidden = engine.extend(
                    self.params,
                    dict(zip(counts, batch.rows)),
                    self.vila_config,
                    cache,
                    image_features,
                    chunk_size=self.config.prefill_chunk_size,
                    states_to_keep=dict(zip(counts, num_kept)),
                    positions=dict(zip(counts, batch.positions)) if batch.positions else None,
                )
            else:
                with cache.append_step(counts) if cache else nullcontext(uncached) as step:
                    recorder = AttentionRecorder(step) if output_attentions else None
                    positions = torch.cat(batch.positions) if batch.positions else step.positions
                    hidden = engine.forward(
                        self.params,
                        batch.rows,
                        positions,
                        self.vila_config,
                        recorder or step,
                        image_features,
                        step.decode,
                        hidden_states,
                    )
                hidden = [row[len(row) - n :] for row, n in zip(hidden, num_kept)]
            with engine.use_default_kernels(self.device, max(map(len, batch.rows)) == 1, (cache or uncached).numerics):
                logits = llama.logits(self.params.llm, torch.cat(hidden)).split([len(row) for row in hidden])
        if start_pos is not None and use_cache:
            self.cache = cache
        if cache and use_cache:
            cache.parameter_versions = write_counts(list(self.parameters()))
        lengths = list(counts.values())
        outputs: dict[str, Any] = {
            "loss": causal_loss(logits, batch.labels) if batch.labels is not None else None,
            "logits": pad(logits, mask),
            CACHE_KEY: cache if use_cache else None,
            "hidden_states": tuple(pad(x.split(lengths), batch.mask) for x in hidden_states) if hidden_states else None,
            "attentions": tuple(pad_attentions(x, batch.mask) for x in recorder.attentions) if recorder else None,
        }
        output = CausalLMOutputWithPast(**outputs)
        as_dataclass = return_dict if return_dict is not None else self.config.return_dict
        return output if as_dataclass else output.to_tuple()

    def check_cache(self, cache: PagedKVCache, has_tokens: bool) -> None:
        """Errors: ValueError for a cache of another shape, or with tokens that this model would not cache as they are:
        after its parameters changed, or of its own cache the config.
        """
        cache.check_model(self.vila_config.llm, self.device)
        if has_tokens and cache.parameter_versions not in (None, write_counts(list(self.parameters()))):
            raise ValueError(
                "the cache holds keys and values of other parameters than the model now has; begin with a new cache"
            )
        if cache is self.cache and cache.settings != self.config.cache_kwargs():
            raise ValueError(
                f"the model's own cache was begun with {cache.settings}, but its config now says "
                f"{self.config.cache_kwargs()}; begin a new one with start_pos=0"
            )

    def new_cache(self, num_sequences: int, num_pages: int = 0, max_pages: int | None = None) -> PagedKVCache:
        """A cache of this model's shape, dtype and device, holding that many empty sequences."""
        llm, cache_kwargs = self.vila_config.llm, self.config.cache_kwargs()
        cache = PagedKVCache(llm, num_pages, dtype=self.dtype, device=self.device, max_pages=max_pages, **cache_kwargs)
        for _ in range(num_sequences):
            cache.allocator.add_sequence()
        return cache
