"""The configs and the tensors of a checkpoint on disk, whatever layout they are in.

A VILA folder holds config.json above llm/, vision_tower/ and mm_projector/. The configs of the parts may be nested in
the top config, null there, or paths. Weights are safetensors or .bin, one file or shards. The language model may be
int4, also as llm-awq releases it: one .pt in llm/. The layouts of LLaVA-1.5 are in llava.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_triton.files.reading import LoadError, find_folder, read_json, short_repr
from vila_triton.models.params import LazyTensors

from .int4_layouts import NATIVE, Layout
from .int4_views import to_native_layout
from .quantization_config import detect_quantization
from .tensor_files import open_tensors

PARTS = ("llm", "vision_tower", "mm_projector")


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint, read as if it were a native VILA folder.

    kind: what the folder is, for messages ("VILA folder", "LLaVA, original layout", ...).
    config, part_configs: the top config and those of the parts. An int4 part's config has a `quantization_config` with
    quant_method "vila-triton", whatever it had on disk.
    tensors: by part, under the names of a released VILA folder; int4 linears are in the native layout.
    companion_dirs: by part, the folder of its other files (tokenizer, image processor).
    layout: the layout on disk of the language model's int4 linears, None if there are none. Other parts are native.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    part_configs: dict[str, dict[str, Any]]
    tensors: dict[str, LazyTensors]
    companion_dirs: dict[str, Path]
    layout: Layout | None = None

    def group_size(self, part: str = "llm") -> int:
        """The number of inputs that share a scale, -1 for all of them; 0 if the part is not int4."""
        return (self.part_configs[part].get("quantization_config") or {}).get("group_size", 0)

    @property
    def rounding(self) -> Any:
        """The rounding of the language model's int4 weights when they are dequantized (`Int4.rounding`)."""
        return (self.part_configs["llm"].get("quantization_config") or {}).get("order", "sub")

    def summary(self) -> str:
        """Describe the checkpoint in one line."""
        groups = "one group a row" if self.group_size() == -1 else f"groups of {self.group_size()}"
        int4 = f"int4 linears ({self.layout.name}, {groups})" if self.layout else "no int4"
        others = (f", {p} int4 (groups of {self.group_size(p)})" for p in PARTS[1:] if self.group_size(p))
        return f"{self.folder}: {self.kind}, {int4}{''.join(others)}"


def open_vila_folder(folder: Path, config: Mapping[str, Any]) -> CheckpointSource:
    """Open a VILA folder. Errors: `LoadError`."""
    folders = {part: find_part_folder(folder, config, part) for part in PARTS}
    part_configs = {part: read_part_config(folders[part], config, part) for part in PARTS}
    tensors = {part: open_tensors(folders[part]) for part in PARTS}
    part_configs["llm"], layout = detect_quantization(part_configs["llm"], tensors["llm"], str(folders["llm"]))
    for part in PARTS[1:]:
        part_configs[part], part_layout = detect_quantization(part_configs[part], tensors[part], str(folders[part]))
        if part_layout not in (None, NATIVE):
            layouts = f"int4 linears are in the layout {part_layout.name}, expected {NATIVE.name}"
            raise LoadError(f"{folders[part]}: {layouts}")
    if layout is not None:
        group_size = part_configs["llm"]["quantization_config"]["group_size"]
        tensors["llm"] = to_native_layout(tensors["llm"], layout, group_size)
    return CheckpointSource(folder, "VILA folder", dict(config), part_configs, tensors, folders, layout)


def find_part_folder(folder: Path, config: Mapping[str, Any], part: str) -> Path:
    """The folder of a part: the one of its name, or the one that the top config names, inside the checkpoint.

    Errors: `LoadError` if there is none.
    """
    configured = config.get(f"{part}_cfg")
    hint = ""
    if part_dir := find_folder(folder, part):
        return part_dir
    if isinstance(configured, str):
        if part_dir := find_folder(folder, configured):
            return part_dir
        hint = f", and config.json says {short_repr(configured)}, which is not there either"
    raise LoadError(f"{folder / part} does not exist{hint}; a VILA folder holds config.json, {', '.join(PARTS)}")


def read_part_config(folder: Path, config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Read the config of a part from its own file, or else from the top config."""
    nested = config.get(f"{part}_cfg")
    if isinstance(nested, dict) and not (folder / "config.json").exists():
        return dict(nested)
    return read_json(folder / "config.json")
