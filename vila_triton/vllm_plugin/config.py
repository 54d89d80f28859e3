"""The config of a VILA folder as vLLM reads it: with the language model's beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AddedToken, LlamaConfig

from ..chat.prompts import IMAGE_TOKEN, stop_token_ids
from ..chat.templates import resolve_template
from ..chat.tokenizer import load_tokenizer
from ..checkpoints.generation_config import read_generation_config
from ..checkpoints.loading import build_vila_config, check_checkpoint, open_checkpoint
from ..checkpoints.sources import CheckpointSource
from ..hf.configuration_vila_llama import VilaLlamaConfig, parse_dtype
from ..models.config import VilaConfig

FIELDS_OF_TOP_CONFIG = ("architectures", "quantization_config", "torch_dtype", "dtype")


class VllmVilaConfig(VilaLlamaConfig):
    """The config of a VILA folder, with `text_config` for vLLM's LLaMA.

    The folder is opened, and its tensors are checked by name and shape, when the config is read: before vLLM starts its
    workers. Errors: those of `open_checkpoint` and `check_checkpoint`.
    """

    text_config: LlamaConfig | None = None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Build the config of the folder `name_or_path`, which transformers' loaders give."""
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        source = open_checkpoint(Path(config._name_or_path))
        check_checkpoint(source)
        for part, values in source.part_configs.items():
            setattr(config, f"{part}_cfg", values)
        config.architectures = ["VilaLlamaForCausalLM"]  # whatever an older release calls it
        config.dtype = parse_dtype(source.config.get("model_dtype", "float16"))
        config.text_config = text_config(source, config)
        return loaded

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The config of the language model, always the same object, since vLLM completes it in place."""
        return self.text_config or self

    def geometry(self) -> VilaConfig:
        """The geometry of the whole model."""
        return build_vila_config({k: v for k, v in self.to_dict().items() if v is not None}, self.part_configs())


def text_config(source: CheckpointSource, config: VllmVilaConfig) -> LlamaConfig:
    """The config of the language model, with all tokens that end an answer: those of the template, the tokenizer and
    the folder's configs; and with the token of an image in its vocabulary, as vLLM indexes logits by tokens of prompts.
    """
    llm = source.part_configs["llm"]
    values = {name: value for name, value in llm.items() if name not in FIELDS_OF_TOP_CONFIG}
    tokenizer = load_tokenizer(source.folder)
    template = resolve_template(source.config.get("conversation_template"), tokenizer)
    generation = read_generation_config([source.folder, source.companion_dirs["llm"]], llm["vocab_size"])
    eos = stop_token_ids(template, tokenizer, llm.get("eos_token_id"), generation.get("eos_token_id"))
    values |= {"eos_token_id": eos, "architectures": ["LlamaForCausalLM"], "dtype": config.dtype}
    values["vocab_size"] = max(llm["vocab_size"], add_image_token(tokenizer) + 1)
    return LlamaConfig.from_dict(values)


def add_image_token(tokenizer: Any) -> int:
    """Make `<image>` a token of a tokenizer, and return its id."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
