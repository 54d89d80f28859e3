"""The quantization_config of int4 linears: read from configs of several tools, and written for each layout."""

from collections.abc import Mapping, Sequence
from typing import Any

from vila_triton.files.reading import LoadError, short_repr
from vila_triton.models.config_fields import GroupSize, expected_instead
from vila_triton.models.params import LazyTensors

from .int4_layouts import AWQ_GEMM, AWQ_V1, AWQ_V2, NATIVE, Layout
from .int4_views import detect_int4

QUANT_METHOD = "vila-triton"
AWQ_VERSIONS = {  # AutoAWQ's names and Hugging Face's, and what each may be on disk
    "gemm": (AWQ_GEMM,),
    "gemv": (AWQ_V1,),
    "gemv_fast": (AWQ_V2,),
    "exllama": (AWQ_GEMM,),
    "llm-awq": (AWQ_V1, AWQ_V2),
}


def detect_quantization(
    config: Mapping[str, Any], tensors: LazyTensors, where: str
) -> tuple[dict[str, Any], Layout | None]:
    """Detect the int4 linears of a part: its config with a native quantization_config, and their layout on disk.

    The config is unchanged and the layout None if there are none. Errors: `LoadError` if config and tensors contradict
    each other, or for another kind of quantization.
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
        settings = f"{short_repr(bits)} bits, zero_point {short_repr(zero_point)}"
        raise LoadError(f"{where}: {settings} is not supported (4 bits with zeros is)")
    other_keys = {key: value for key, value in config.items() if key not in ("quantization_config", "int4_order")}
    rounding = quant_config.get("order") or config.get("int4_order") or layout.rounding
    return other_keys | make_quantization_config(NATIVE, group_size, rounding, dense_linears(tensors)), layout


def dense_linears(tensors: LazyTensors) -> list[str]:
    """The linears of the language model's layers that are not int4."""
    linears = (name.removesuffix(".weight") for name in tensors.meta if name.startswith("model.layers."))
    return [name for name in linears if name.endswith("_proj")]


def make_quantization_config(
    layout: Layout, group_size: int, rounding: str, modules_to_not_convert: Sequence[str] = ()
) -> dict[str, Any]:
    """Make the config entries of a part whose linears are int4 in a layout; llm-awq v2 has none but the rounding.

    modules_to_not_convert: the linears that are dense.
    """
    # Files call the rounding "order" ("int4_order" beside an AWQ config).
    rounding_key = {} if rounding == layout.rounding else {"order": rounding}
    skipped_key = {"modules_to_not_convert": list(modules_to_not_convert)} if modules_to_not_convert else {}
    if layout is NATIVE:
        config = {"quant_method": QUANT_METHOD, "bits": 4, "group_size": group_size}
        return {"quantization_config": {**config, **skipped_key, **rounding_key}}
    rounding_entry = {"int4_order": rounding} if rounding_key else {}
    if layout is AWQ_V2:
        return rounding_entry
    version = next(version for version, layouts in AWQ_VERSIONS.items() if layout in layouts)
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": version}
    return {"quantization_config": config | skipped_key, **rounding_entry}
