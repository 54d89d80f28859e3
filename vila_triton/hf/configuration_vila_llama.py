"""`VilaLlamaConfig`: the top config.json of a VILA folder as a Hugging Face config."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from vila_triton.checkpoints import loading
from vila_triton.files.reading import find_folder, short_repr

from ..models.config import ConfigError, RunSettings, read_dataclass, with_new_spellings

# Arguments that transformers' Auto classes add, and fields that describe a classifier, which this model is not.
AUTO_CLASS_ARGUMENTS = ("_from_auto", "adapter_kwargs", "local_files_only", "revision", "trust_remote_code")
LABEL_FIELDS = ("num_labels", "id2label", "label2id")
DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def parse_dtype(name: str) -> torch.dtype:
    """Parse a dtype as `model_dtype` spells it, "torch.float16" or "float16". Errors: `ConfigError`."""
    full = f"torch.{str(name).removeprefix('torch.')}"
    if full not in DTYPES:
        raise ConfigError(f"config: model_dtype {short_repr(name)} is not supported ({', '.join(DTYPES)} are)")
    return DTYPES[full]


class VilaLlamaConfig(PreTrainedConfig):
    """The top config.json of a VILA folder. The three nested configs may be null there and lie in the parts' folders
    instead.
    """

    model_type = "llava_llama"

    llm_cfg: dict | str | None = None
    vision_tower_cfg: dict | str | None = None
    mm_projector_cfg: dict | str | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None  # the language model's, for transformers' beam search and peft's saving
    mm_hidden_size: int | None = None
    mm_vision_select_layer: int | None = None
    mm_vision_select_feature: str | None = None
    s2: bool | None = None
    resume_path: str | None = None
    prefill_chunk_size: int = 512
    page_size: int = RunSettings.page_size
    kv_dtype: str | None = None
    attention_numerics: str = "fast"

    @classmethod
    def from_configs(cls, top: Mapping[str, Any], part_configs: Mapping[str, Any]) -> "VilaLlamaConfig":
        """Build a config from a folder's top config and those of its parts. Errors: `ConfigError` if transformers
        refuses the values.
        """
        dropped = [*LABEL_FIELDS, *(f.name for f in fields(RunSettings) if top.get(f.name) is None)]
        values = {name: value for name, value in top.items() if name not in dropped}
        try:
            return cls(**values | {f"{part}_cfg": part_config for part, part_config in part_configs.items()})
        except Exception as error:  # transformers validates its fields with many kinds of errors
            raise ConfigError(
                f"config: transformers refuses it: {str(error).strip() or type(error).__name__}"
            ) from None

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read the config of a folder, as transformers does, and the size of its vocabulary from that of its part."""
        loaded = super().from_pretrained(folder, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config._name_or_path = config._name_or_path or str(folder)
        if config.vocab_size is None and (llm := config.part_config("llm")):
            config.vocab_size = llm.get("vocab_size")
        return loaded

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Build a config from a config.json, as transformers' loaders do.

        Errors: NotImplementedError for the server of transformers.
        """
        if "tqdm_class" in kwargs:  # given by that server alone, which would look for the class in transformers next
            raise NotImplementedError(
                "`transformers serve` serves classes of transformers only; `vila-triton serve FOLDER` serves this one"
            )
        return super().from_dict(with_new_spellings(config_dict), **kwargs)

    def cache_kwargs(self) -> dict[str, Any]:
        """The arguments of `PagedKVCache` that this config sets. Errors: `ConfigError`."""
        values = {name: getattr(self, name) for name in ("page_size", "kv_dtype", "attention_numerics")}
        settings = read_dataclass(RunSettings, values, "config")
        return {"page_size": settings.page_size, "kv_dtype": settings.kv_dtype, "numerics": settings.attention_numerics}

    def part_configs(self) -> dict[str, dict[str, Any]]:
        """The three nested configs, read from the parts' folders where they are null here.

        Errors: ValueError if one is neither here nor in a folder.
        """
        configs = {part: self.part_config(part) for part in loading.PARTS}
        if missing := ", ".join(f"`{part}_cfg`" for part, config in configs.items() if config is None):
            raise ValueError(f"`llm_cfg` `mm_projector_cfg` `vision_tower_cfg` not found in the config: no {missing}")
        return {part: config for part, config in configs.items() if config is not None}

    def part_config(self, part: str) -> dict[str, Any] | None:
        """The nested config of a part, read from its folder where it is null here; None if it is not there either."""
        root, value = self._name_or_path or self.resume_path, getattr(self, f"{part}_cfg")
        if isinstance(value, dict):
            return value
        folder = find_folder(Path(root), value if isinstance(value, str) else part) if root else None
        return loading.read_json(folder / "config.json") if folder and (folder / "config.json").exists() else None
