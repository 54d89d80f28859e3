"""`install`: our attention and our int4 linear maps for models of transformers."""

from collections.abc import Mapping
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_awq import AwqQuantizer

from ..checkpoints.quantization_config import QUANT_METHOD
from . import attention_interface
from .int4_quantizer import Int4Config, Int4Quantizer

ATTENTION = attention_interface.NAME


def install(awq: bool = False) -> None:
    """Let models of transformers run on our ops: `attn_implementation="vila_triton"` for attention, and
    `quantization_config=Int4Config(...)` for int4 linear maps.

    awq: AWQ checkpoints load onto the same linear maps, in place of gptqmodel's. A second call changes nothing. Errors:
    ValueError if somebody else has registered one of the names; nothing is registered then.
    """
    expected: list[tuple[Mapping[str, Any], str, str, tuple[Any, ...]]] = [
        (AttentionInterface(), "attention", ATTENTION, (attention_interface.attention,)),
        (AttentionMaskInterface(), "attention mask", ATTENTION, (attention_interface.key_mask,)),
        (AUTO_QUANTIZATION_CONFIG_MAPPING, "quantization config", QUANT_METHOD, (Int4Config,)),
        (AUTO_QUANTIZER_MAPPING, "quantizer", QUANT_METHOD, (Int4Quantizer,)),
    ]
    if awq:
        expected.append((AUTO_QUANTIZER_MAPPING, "quantizer", "awq", (AwqQuantizer, Int4Quantizer)))
    for registered, kind, name, allowed in expected:
        if name in registered and registered[name] not in allowed:
            raise ValueError(f"transformers has another {kind} {name!r} already: {registered[name]}")
    AttentionInterface.register(ATTENTION, attention_interface.attention)
    AttentionMaskInterface.register(ATTENTION, attention_interface.key_mask)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(Int4Config)
        register_quantizer(QUANT_METHOD)(Int4Quantizer)
    if awq:
        AUTO_QUANTIZER_MAPPING["awq"] = Int4Quantizer
