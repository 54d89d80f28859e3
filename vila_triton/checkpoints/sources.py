"""What a checkpoint on disk is: its configs and its tensors, whatever layout it came in.

A VILA folder holds config.json above llm/, vision_tower/ and mm_projector/. The parts' configs may be nested in the top
one, null there, or paths; weights are safetensors or .bin, whole or in shards; the language model may be int4, also as
llm-awq releases it: one .pt in llm/. The layouts of LLaVA-1.5 are in llava.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.reading import LoadError, find_folder, read_json, short_repr
from ..models.config_fields import GroupSize, expected_instead
from ..models.params import LazyTensors
from .int4_layouts import AWQ_GEMM, AWQ_V1, AWQ_V2, NATIVE, Layout
from .int4_views import detect_int4, to_native_layout
from .tensor_files import open_tensors

PARTS = ("llm", "vision_tower", "mm_projector")
QUANT_METHOD = "vila-triton"
AWQ_VERSIONS = {  # AutoAWQ's names and Hugging Face's, and what each may be on disk
    "gemm": (AWQ_GEMM,),
    "gemv": (AWQ_V1,),
    "gemv_fast": (AWQ_V2,),
    "exllama": (AWQ_GEMM,),
    "llm-awq": (AWQ_V1, AWQ_V2),
}


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint, read as a VILA folder would be.

    top, parts: the config dictionaries; that of an int4 part says so in our words, whatever layout it is in on disk.
    tensors: by part, under the names that a released VILA folder has, int4 linears in our layout.
    beside: by part, the folder with its other files (tokenizer, image processor).
    layout: that of the llm's int4 linears on disk, None if there are none. Those of the other parts are in ours.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    part_configs: dict[str, dict[str, Any]]
    tensors: dict[str, LazyTensors]
    companion_dirs: dict[str, Path]
    layout: Layout | None = None

    def group_size(self, part: str = "llm") -> int:
        """Inputs that share a scale, -1 for all of them; 0 if the part is not int4."""
        return (self.part_configs[part].get("quantization_config") or {}).get("group_size", 0)

    @property
    def rounding(self) -> Any:
        """Where the llm's int4 weights are rounded (`Int4.order`)."""
        return (self.part_configs["llm"].get("quantization_config") or {}).get("order", "sub")

    def summary(self) -> str:
        """In one line: what was found."""
        groups = "one group a row" if self.group_size() == -1 else f"groups of {self.group_size()}"
        int4 = f"int4 linears ({self.layout.name}, {groups})" if self.layout else "no int4"
        other_parts = "".join(
            f", {part} int4 (groups of {self.group_size(part)})" for part in PARTS[1:] if self.group_size(part)
        )
        return f"{self.folder}: {self.kind}, {int4}{other_parts}"


def open_vila_folder(folder: Path, config: Mapping[str, Any]) -> CheckpointSource:
    """A VILA folder. Errors: `LoadError`."""
    folders = {part: find_part_folder(folder, config, part) for part in PARTS}
    part_configs = {part: read_part_config(folders[part], config, part) for part in PARTS}
    tensors = {part: open_tensors(folders[part]) for part in PARTS}
    part_configs["llm"], layout = detect_quantization(part_configs["llm"], tensors["llm"], str(folders["llm"]))
    for part in PARTS[1:]:
        part_configs[part], part_layout = detect_quantization(part_configs[part], tensors[part], str(folders[part]))
        if part_layout not in (None, NATIVE):
            raise LoadError(
                f"{folders[part]}: int4 linears are in the layout {part_layout.name}, expected {NATIVE.name}"
            )
    if layout is not None:
        tensors["llm"] = to_native_layout(
            tensors["llm"], layout, part_configs["llm"]["quantization_config"]["group_size"]
        )
    return CheckpointSource(folder, "VILA folder", dict(config), part_configs, tensors, folders, layout)


def find_part_folder(folder: Path, config: Mapping[str, Any], part: str) -> Path:
    """Where a part is: in the folder of its name, or where the top config says, but in the checkpoint."""
    configured = config.get(f"{part}_cfg")
    for name in (part, *([configured] if isinstance(configured, str) else [])):
        if part_dir := find_folder(folder, name):
            return part_dir
    configured = (
        f", and config.json says {short_repr(configured)}, which is not there either"
        if isinstance(configured, str)
        else ""
    )
    raise LoadError(f"{folder / part} does not exist{configured}; a VILA folder holds config.json, {', '.join(PARTS)}")


def read_part_config(folder: Path, config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A part's config: its own file, or what is nested in the top config if it has none."""
    nested = config.get(f"{part}_cfg")
    if isinstance(nested, dict) and not (folder / "config.json").exists():
        return dict(nested)
    return read_json(folder / "config.json")


def detect_quantization(
    config: Mapping[str, Any], tensors: LazyTensors, where: str
) -> tuple[dict[str, Any], Layout | None]:
    """The config of a part with its int4 linears said in our words, and their layout on disk.

    Errors: `LoadError` if config and tensors contradict each other.
    """
    quant_config = config.get("quantization_config") or {}
    if not isinstance(quant_config, dict):
        raise LoadError(f"{where}: quantization_config is a {type(quant_config).__name__}, expected an object")
    method = quant_config.get("quant_method")
    if method not in (None, "awq", QUANT_METHOD):
        return dict(config), None
    group_size = quant_config.get("group_size", quant_config.get("q_group_size"))
    if group_size is not None and (expected_instead(GroupSize, group_size) or not group_size):
        raise LoadError(f"{where}: group_size is {short_repr(group_size)}, expected inputs, or -1 for all of them")
    detected = detect_int4(tensors.meta, where, group_size or 0)
    if detected is None:
        if quant_config:
            raise LoadError(f"{where}: the config says int4 ({method}), but there is no .qweight among its tensors")
        return dict(config), None
    layout, group_size = detected
    version = str(quant_config.get("version") or quant_config.get("format") or "gemm").lower()
    allowed = {"awq": AWQ_VERSIONS.get(version, ()), QUANT_METHOD: (NATIVE,), None: (layout,)}[method]
    if layout not in allowed or (layout is NATIVE and not quant_config):
        description = short_repr(quant_config) if quant_config else "nothing"
        raise LoadError(f"{where}: int4 linears are in the layout {layout.name}, but the config says {description}")
    bits, zero_point = quant_config.get("bits", quant_config.get("w_bit", 4)), quant_config.get("zero_point", True)
    if bits != 4 or zero_point is not True:
        raise LoadError(
            f"{where}: {short_repr(bits)} bits, zero_point {short_repr(zero_point)} is not supported (4 bits with zeros is)"
        )
    other_keys = {key: value for key, value in config.items() if key not in ("quantization_config", "int4_order")}
    rounding = quant_config.get("order") or config.get("int4_order") or layout.rounding
    return other_keys | make_quantization_config(NATIVE, group_size, rounding, dense_linears(tensors)), layout


def dense_linears(tensors: LazyTensors) -> list[str]:
    """The linears of the language model's layers that were not made int4."""
    linears = (name.removesuffix(".weight") for name in tensors.meta if name.startswith("model.layers."))
    return [name for name in linears if name.endswith("_proj")]


def make_quantization_config(
    layout: Layout, group_size: int, rounding: str, modules_to_not_convert: Sequence[str] = ()
) -> dict[str, Any]:
    """What a part's config.json says of int4 linears in a layout and of dense ones; llm-awq's own say nothing."""
    rounding_key = {} if rounding == layout.rounding else {"order": rounding}
    skipped_key = {"modules_to_not_convert": list(modules_to_not_convert)} if modules_to_not_convert else {}
    if layout is NATIVE:
        config = {"quant_method": QUANT_METHOD, "bits": 4, "group_size": group_size}
        return {"quantization_config": {**config, **skipped_key, **rounding_key}}
    llama_key = {"int4_order": rounding} if rounding_key else {}
    if layout is AWQ_V2:
        return llama_key
    version = next(version for version, layouts in AWQ_VERSIONS.items() if layout in layouts)
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": version}
    return {"quantization_config": config | skipped_key, **llama_key}
