"""The settings of a quantization, and what a run of it works on."""

from dataclasses import dataclass

import torch

from vila_triton.checkpoints.sources import CheckpointSource
from vila_triton.models.config import VilaConfig

from .calibration_data import CalibrationSet

METHODS = ("awq-gptq", "llm-awq")


@dataclass(frozen=True)
class QuantizeConfig:
    """The settings of a quantization.

    method: "awq-gptq" (AWQ scales, clipping and GPTQ) or "llm-awq" (its own objective); group_size: inputs that share a
    scale. With "awq-gptq" only: propagate_error: quantize each layer from the activations behind the quantized layers
    before it; image_weight: how much an image token counts for each 1 of a text token; extra_parts: of "vision_tower"
    and "mm_projector" those that are quantized too. `pipeline.round_to_nearest` takes extra_parts as well.
    """

    method: str = "awq-gptq"
    group_size: int = 128
    propagate_error: bool = True
    image_weight: float = 1.0
    extra_parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizationRun:
    """The original checkpoint, its geometry, how to quantize it, the calibration set, and the device for the work."""

    source: CheckpointSource
    cfg: VilaConfig
    config: QuantizeConfig
    calibration: CalibrationSet
    device: torch.device
