"""What a checkpoint on disk is: its configs and its tensors, whatever layout it came in.

A VILA folder holds config.json above llm/, vision_tower/ and mm_projector/. The parts' configs may be nested in the top
one, null there, or paths; weights are safetensors or .bin, whole or in shards; the language model may be int4, also as
llm-awq releases it: one .pt in llm/. The layouts of LLaVA-1.5 are in llava.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.reading import LoadError, folder_in, read_json, shown
from ..models.config_fields import Group, expected
from ..models.params import Lazy
from .int4_layouts import GEMM, OURS, V1, V2, Layout
from .int4_views import decoded, survey
from .tensor_files import open_tensors

PARTS = ("llm", "vision_tower", "mm_projector")
OUR_METHOD = "vila-triton"
VERSIONS = {  # AutoAWQ's names and Hugging Face's, and what each may be on disk
    "gemm": (GEMM,),
    "gemv": (V1,),
    "gemv_fast": (V2,),
    "exllama": (GEMM,),
    "llm-awq": (V1, V2),
}


@dataclass(frozen=True)
class Source:
    """A checkpoint, read as a VILA folder would be.

    top, parts: the config dictionaries; that of an int4 part says so in our words, whatever layout it is in on disk.
    tensors: by part, under the names that a released VILA folder has, int4 linears in our layout.
    beside: by part, the folder with its other files (tokenizer, image processor).
    layout: that of the llm's int4 linears on disk, None if there are none. Those of the other parts are in ours.
    """

    folder: Path
    kind: str
    top: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    tensors: dict[str, Lazy]
    beside: dict[str, Path]
    layout: Layout | None = None

    def group(self, part: str = "llm") -> int:
        """Inputs that share a scale, -1 for all of them; 0 if the part is not int4."""
        return (self.parts[part].get("quantization_config") or {}).get("group_size", 0)

    @property
    def order(self) -> Any:
        """Where the llm's int4 weights are rounded (`Int4.order`)."""
        return (self.parts["llm"].get("quantization_config") or {}).get("order", "sub")

    def described(self) -> str:
        """In one line: what was found."""
        groups = "one group a row" if self.group() == -1 else f"groups of {self.group()}"
        int4 = f"int4 linears ({self.layout.name}, {groups})" if self.layout else "no int4"
        more = "".join(f", {part} int4 (groups of {self.group(part)})" for part in PARTS[1:] if self.group(part))
        return f"{self.folder}: {self.kind}, {int4}{more}"


def vila_source(folder: Path, top: Mapping[str, Any]) -> Source:
    """A VILA folder. Errors: `LoadError`."""
    places = {part: part_folder(folder, top, part) for part in PARTS}
    parts = {part: part_config(places[part], top, part) for part in PARTS}
    tensors = {part: open_tensors(places[part]) for part in PARTS}
    parts["llm"], layout = int4_config(parts["llm"], tensors["llm"], str(places["llm"]))
    for part in PARTS[1:]:
        parts[part], found = int4_config(parts[part], tensors[part], str(places[part]))
        if found not in (None, OURS):
            raise LoadError(f"{places[part]}: int4 linears are in the layout {found.name}, expected {OURS.name}")
    if layout is not None:
        tensors["llm"] = decoded(tensors["llm"], layout, parts["llm"]["quantization_config"]["group_size"])
    return Source(folder, "VILA folder", dict(top), parts, tensors, places, layout)


def part_folder(folder: Path, top: Mapping[str, Any], part: str) -> Path:
    """Where a part is: in the folder of its name, or where the top config says, but in the checkpoint."""
    said = top.get(f"{part}_cfg")
    for name in (part, *([said] if isinstance(said, str) else [])):
        if place := folder_in(folder, name):
            return place
    said = f", and config.json says {shown(said)}, which is not there either" if isinstance(said, str) else ""
    raise LoadError(f"{folder / part} does not exist{said}; a VILA folder holds config.json, {', '.join(PARTS)}")


def part_config(place: Path, top: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A part's config: its own file, or what is nested in the top config if it has none."""
    nested = top.get(f"{part}_cfg")
    if isinstance(nested, dict) and not (place / "config.json").exists():
        return dict(nested)
    return read_json(place / "config.json")


def int4_config(part: Mapping[str, Any], tensors: Lazy, where: str) -> tuple[dict[str, Any], Layout | None]:
    """The config of a part with its int4 linears said in our words, and their layout on disk.

    Errors: `LoadError` if config and tensors contradict each other.
    """
    said = part.get("quantization_config") or {}
    if not isinstance(said, dict):
        raise LoadError(f"{where}: quantization_config is a {type(said).__name__}, expected an object")
    method = said.get("quant_method")
    if method not in (None, "awq", OUR_METHOD):
        return dict(part), None
    group = said.get("group_size", said.get("q_group_size"))
    if group is not None and (expected(Group, group) or not group):
        raise LoadError(f"{where}: group_size is {shown(group)}, expected inputs, or -1 for all of them")
    found = survey(tensors.meta, where, group or 0)
    if found is None:
        if said:
            raise LoadError(f"{where}: the config says int4 ({method}), but there is no .qweight among its tensors")
        return dict(part), None
    layout, group = found
    version = str(said.get("version") or said.get("format") or "gemm").lower()
    allowed = {"awq": VERSIONS.get(version, ()), OUR_METHOD: (OURS,), None: (layout,)}[method]
    if layout not in allowed or (layout is OURS and not said):
        what = shown(said) if said else "nothing"
        raise LoadError(f"{where}: int4 linears are in the layout {layout.name}, but the config says {what}")
    bits, zero_point = said.get("bits", said.get("w_bit", 4)), said.get("zero_point", True)
    if bits != 4 or zero_point is not True:
        raise LoadError(
            f"{where}: {shown(bits)} bits, zero_point {shown(zero_point)} is not supported (4 bits with zeros is)"
        )
    rest = {key: value for key, value in part.items() if key not in ("quantization_config", "int4_order")}
    order = said.get("order") or part.get("int4_order") or layout.order
    return rest | quantization(OURS, group, order, dense_linears(tensors)), layout


def dense_linears(tensors: Lazy) -> list[str]:
    """The linears of the language model's layers that were not made int4."""
    found = (name.removesuffix(".weight") for name in tensors.meta if name.startswith("model.layers."))
    return [name for name in found if name.endswith("_proj")]


def quantization(layout: Layout, group: int, order: str, dense: Sequence[str] = ()) -> dict[str, Any]:
    """What a part's config.json says of int4 linears in a layout and of dense ones; llm-awq's own say nothing."""
    named = {} if order == layout.order else {"order": order}
    left = {"modules_to_not_convert": list(dense)} if dense else {}
    if layout is OURS:
        config = {"quant_method": OUR_METHOD, "bits": 4, "group_size": group}
        return {"quantization_config": {**config, **left, **named}}
    other = {"int4_order": order} if named else {}
    if layout is V2:
        return other
    version = next(version for version, of in VERSIONS.items() if layout in of)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}
    return {"quantization_config": config | left, **other}
