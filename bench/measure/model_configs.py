"""The models of configs/models."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vila_triton.models.config import LlamaConfig
from vila_triton.paths import config_dir


@dataclass(frozen=True)
class ReleasedModel:
    """One file of configs/models. `vision_tower` and `mm_projector` are as in it, under Hugging Face's names; both are
    empty for a language model alone.
    """

    name: str
    template: str
    image_tokens: int
    llm: LlamaConfig
    fp16_bytes: int | None = None  # of all three parts
    int4_bytes: int | None = None
    vision_tower: dict[str, Any] = field(default_factory=dict)
    mm_projector: dict[str, Any] = field(default_factory=dict)


def model_files() -> dict[str, Path]:
    """Returns the files of configs/models by name."""
    return {file.stem: file for file in sorted((config_dir() / "models").glob("*.toml"))}


def load_model(model: str | Path, layers: int | None = None, group_size: int | None = None) -> ReleasedModel:
    """Reads a file, or the one of this name in configs/models. `layers` keeps only so many layers of the language
    model, `group_size` makes its linears int4. Errors: ValueError naming the models there are.
    """
    file = model_files().get(str(model), Path(model))
    if not file.is_file():
        raise ValueError(
            f"no model {str(model)!r}; there are: {', '.join(model_files())}, or give the path of a .toml file"
        )
    table = tomllib.loads(file.read_text())
    if layers is not None and layers < 1:
        raise ValueError(f"{layers} layers: a language model has at least 1")
    llm = table["llm"] | ({"num_hidden_layers": layers} if layers else {})
    if group_size:
        llm["quantization_config"] = {"quant_method": "vila-triton", "group_size": group_size}
    return ReleasedModel(**{**table, "llm": LlamaConfig.from_dict(llm)})
