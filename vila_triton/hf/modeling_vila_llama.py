"""`VilaLlamaForCausalLM`: the functional model with the interface of a Hugging Face model."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vila_triton.cache.paged_cache import PagedKVCache, resolve_past
from vila_triton.checkpoints import loading
from vila_triton.checkpoints.generation_config import GENERATION_CONFIG_NAME
from vila_triton.device import pick_device
from vila_triton.engine import engine
from vila_triton.files.atomic import write_json

from ..models import llama, vila
from ..models.config_fields import name_folder_in_errors
from ..models.params import init_tree
from .configuration_vila_llama import AUTO_CLASS_ARGUMENTS, VilaLlamaConfig, parse_dtype
from .forward_pass import ForwardPass, check_chunked_prefill, check_inputs, check_options, keep_embeddings
from .generation import CACHE_KEY, VilaGenerationMixin
from .linear_modules import InputEmbeddings
from .padding import check_any_label, require_tensor, unpad, unpad_embeddings
from .params_module import ParamsModule
from .training import TrainingMixin, check_checkpointing, requiring_grads
from .unsupported import UnsupportedMethods, check_device_and_dtype


class VilaLlamaForCausalLM(UnsupportedMethods, TrainingMixin, PreTrainedModel, VilaGenerationMixin):
    """VILA: `.vision_tower` and `.mm_projector` encode images to positions of `.llm`, which generates the answer."""

    config_class = VilaLlamaConfig
    config: VilaLlamaConfig
    base_model_prefix = ""

    def __init__(self, config: VilaLlamaConfig):
        super().__init__(config)
        self.init_vlm(config)
        self.post_init()

    @torch.inference_mode(False)  # inference tensors could not be trained, and hide writes
    def init_vlm(self, config: VilaLlamaConfig, params: vila.Vila | None = None) -> None:
        """Build the three parts, with random parameters unless `params` is given; a model that has its parts already
        keeps them.
        """
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
            joined = llama.joined_leaves(specs.llm) if part == "llm" else ()
            self.add_module(part, ParamsModule(getattr(specs, part), getattr(params, part), joined))
        self.padding_config = {
            "vocab_size": self.vila_config.llm.vocab_size,
            "max_length": part_configs["llm"].get("tokenizer_model_max_length"),
            "padding_side": part_configs["llm"].get("tokenizer_padding_side") or "right",
        }
        self.set_default_stop_tokens(part_configs["llm"].get("eos_token_id"))
        self.cache: PagedKVCache | None = None

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: `init_vlm` has drawn or loaded all parameters, and transformers would draw them again."""

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
        """Load a VILA or LLaVA-1.5 folder.

        config: in place of the folder's. device: by default the GPU if there is one. dtype: by default, and for "auto",
        the config's.
        Errors: `LoadError` listing every tensor that does not fit, `ConfigError` for values that are not supported,
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

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, folder: str | Path, is_main_process: bool = True, state_dict: None = None
    ) -> None:
        """Write a VILA folder that `from_pretrained` reads back to the same bits, with the tokenizer of the folder it
        was loaded from.

        is_main_process: False writes nothing, as Hugging Face's `Trainer` asks of all processes but one. Errors:
        ValueError for a state_dict.
        """
        if state_dict is not None:
            raise ValueError("save_pretrained writes the model's own parameters; leave state_dict None")
        if not is_main_process:
            return
        top_config = {k: v for k, v in self.config.to_diff_dict().items() if not k.endswith("_cfg")}
        top_config |= {"architectures": [type(self).__name__], "model_dtype": str(self.dtype)}
        source = Path(self.config._name_or_path) if self.config._name_or_path else None
        tokenizer_source = source if source and source.is_dir() else None
        loading.save_checkpoint(Path(folder), top_config, self.config.part_configs(), self.params, tokenizer_source)
        settings, eos = self.generation_settings(), getattr(self.generation_config, "eos_token_id", None)
        if settings or eos != self.config.part_configs()["llm"].get("eos_token_id"):
            write_json(Path(folder) / GENERATION_CONFIG_NAME, {**settings, "eos_token_id": eos})

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """The token embeddings as a torch module that shares the model's parameter, and takes no hooks."""
        return InputEmbeddings(self.params.llm.embedding)

    def get_output_embeddings(self) -> torch.nn.Module:
        """The language-model head; one that shares the parameter of the embeddings where these serve as head."""
        llm: Any = self.llm
        if self.params.llm.head is not None:
            return llm.lm_head
        n, k = self.params.llm.embedding.shape
        head = torch.nn.Linear(k, n, bias=False, device="meta")
        head.weight = self.params.llm.embedding
        return head

    @property
    def params(self) -> vila.Vila:
        """The parameters as the tree that the functional model takes."""
        return vila.Vila(*(getattr(self, part).params for part in loading.PARTS))

    def requires_grad_(self, requires_grad: bool = True) -> "VilaLlamaForCausalLM":
        """As of any module; int4 weights stay frozen."""
        for part in loading.PARTS:
            getattr(self, part).requires_grad_(requires_grad)
        return self

    def parameter_versions(self) -> object:
        """A value that changes with the parameters and with adapters, to compare: see `ParamsModule.versions`."""
        return [getattr(self, part).versions() for part in loading.PARTS]

    def encode_images(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Encode images [n, c, H, W], or [b, n, c, H, W], or a list of either or of [c, H, W] -> image features [n,
        tokens, e].
        """
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
            raise ValueError(f"{listing}; images need all parts in one dtype: model.to(dtype)")
        images, numerics = images.to(self.device, self.dtype), self.config.attention_numerics
        return engine.encode_images(self.params, images, self.vila_config, numerics, self.is_checkpointing)

    @property
    def is_checkpointing(self) -> bool:
        """True if a forward pass that begins now keeps the inputs of layers alone for the backward pass."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def image_features(self, images: Tensor | Sequence[Tensor] | None) -> tuple[Tensor | None, list[int]]:
        """The features of all images end to end [rows, e], and how many positions each image takes."""
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
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model -> logits [b, t, v] of every position, each image widened to its positions; 0 at padding.

        input_ids [b, t] with -200 for each image of `images`, or inputs_embeds [b, t, e]. The cache is
        `past_key_values` with one sequence per row; or, if `start_pos` is given, the model's own, continued from
        there: 0 starts anew, less than its length rolls it back (one number, or one for each row); or a new one.
        use_cache=False, the default in training mode, reads the cache without adding to it. `chunk_prefilling` runs at
        most `config.prefill_chunk_size` tokens of a sequence at a time. logits_to_keep=n returns the last n positions
        only. The loss is the mean over all labels, or their sum divided by `num_items_in_batch`.
        Errors: ValueError naming the argument, before anything is changed.
        """
        check_device_and_dtype(self.device, self.dtype)
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True)) and not self.training
        chunk_size = self.config.prefill_chunk_size if chunk_prefilling else None
        check_inputs(input_ids, inputs_embeds, images)
        check_options(special_token, labels, logits_to_keep, num_items_in_batch)
        if chunk_prefilling:
            check_chunked_prefill(chunk_size, output_attentions, output_hidden_states)
        inputs: Tensor = input_ids if input_ids is not None else inputs_embeds  # pyright: ignore
        needs_cache = bool(chunk_size) or self.config.attention_numerics == "batch_invariant"
        if self.is_checkpointing:
            check_checkpointing(use_cache, needs_cache or past_key_values is not None or start_pos is not None)
        cache, context_lens = resolve_past(self.cache, past_key_values, start_pos, len(inputs))
        if cache:
            self.check_cache(cache, any(context_lens))
        if output_attentions and any(context_lens):
            raise ValueError(
                "output_attentions needs the whole sequence in one pass, but past_key_values or start_pos continue one"
            )
        image_features, tokens_per_image = self.image_features(images)
        args = inputs.to(self.device), attention_mask, position_ids, labels
        if inputs_embeds is not None:
            batch = unpad_embeddings(*args, self.padding_config["vocab_size"], context_lens=context_lens)
            embed = keep_embeddings
        else:
            batch = unpad(*args, tokens_per_image, context_lens=context_lens, **self.padding_config)
            embed = partial(vila.embed_spliced, self.params, image_features=image_features)
        if batch.labels is not None and num_items_in_batch is None:
            check_any_label(batch.labels)
        embed = requiring_grads(embed) if self.inputs_require_grads else embed
        # With numerics "batch_invariant" keys and values are rounded to the format of pages, also if none are kept.
        if cache is None and (use_cache or needs_cache):
            cache = self.new_cache(len(inputs))
        states, attentions = [] if output_hidden_states else None, [] if output_attentions else None
        run = ForwardPass(self.params, self.vila_config, batch, embed, logits_to_keep, states, attentions)
        if cache is None:
            logits = run.run_uncached(self.device, self.is_checkpointing)
        else:
            with cache.lock, cache.roll_back(context_lens, in_place=use_cache) as sequences:
                logits = run.run_cached(cache, sequences, chunk_size)
        if start_pos is not None and use_cache:
            self.cache = cache
        if cache and use_cache:
            cache.parameter_versions = self.parameter_versions()
        outputs: dict[str, Any] = run.outputs(logits, num_items_in_batch) | {CACHE_KEY: cache if use_cache else None}
        output = CausalLMOutputWithPast(**outputs)
        as_dataclass = return_dict if return_dict is not None else self.config.return_dict
        return output if as_dataclass else output.to_tuple()

    def check_cache(self, cache: PagedKVCache, has_tokens: bool) -> None:
        """Errors: ValueError for a cache of another geometry or of other parameters than the model now has; or for the
        model's own cache after its config changed.
        """
        cache.check_model(self.vila_config.llm, self.device)
        if has_tokens and cache.parameter_versions not in (None, self.parameter_versions()):
            raise ValueError(
                "the cache holds keys and values of other parameters than the model now has; begin with a new cache"
            )
        if cache is self.cache and cache.settings != self.config.cache_kwargs():
            raise ValueError(
                f"the model's own cache was begun with {cache.settings}, but its config now says "
                f"{self.config.cache_kwargs()}; begin a new one with start_pos=0"
            )

    def new_cache(self, num_sequences: int, num_pages: int = 0, max_pages: int | None = None) -> PagedKVCache:
        """Make a cache of this model's geometry, dtype and device, with `num_sequences` empty sequences."""
        llm, cache_kwargs = self.vila_config.llm, self.config.cache_kwargs()
        cache = PagedKVCache(llm, num_pages, dtype=self.dtype, device=self.device, max_pages=max_pages, **cache_kwargs)
        for _ in range(num_sequences):
            cache.allocator.add_sequence()
        return cache
