"""Images on their way into vLLM: preprocessed as VILA does, and in the place of each `<image>` its image positions."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from ..chat.prompts import IMAGE_TOKEN
from ..images.processing import load_image_processor, preprocess_images
from .config import VllmVilaConfig

cached_image_processor = lru_cache(4)(load_image_processor)


class VilaProcessingInfo(BaseProcessingInfo):
    """The facts about inputs that vLLM asks for."""

    def get_hf_config(self) -> VllmVilaConfig:
        return self.ctx.get_hf_config(VllmVilaConfig)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().geometry().tokens_per_image}


class VilaDummyInputs(BaseDummyInputsBuilder[VilaProcessingInfo]):
    """The prompt with which vLLM measures how much memory a step takes."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        size = self.info.get_hf_config().geometry().vision_tower.image_size
        return {"image": self._get_dummy_images(width=size, height=size, num_images=mm_counts.get("image", 0))}


class VilaMultiModalProcessor(BaseMultiModalProcessor[VilaProcessingInfo]):
    """Preprocesses images, each on its own, and replaces the token of each by its image positions."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        if hf_kwargs:
            raise ValueError(f"mm_processor_kwargs {', '.join(hf_kwargs)}: VILA's preprocessing takes none")
        folder = Path(self.info.ctx.model_config.model)
        mode = getattr(self.info.get_hf_config(), "image_aspect_ratio", None)
        images = hf_data["images"]
        if others := [type(image).__name__ for image in images if not isinstance(image, Image.Image)]:
            raise ValueError(f"an image of a prompt is a PIL image, not {others[0]}")  # such as the path of a file
        return BatchFeature({"images": preprocess_images(images, cached_image_processor(folder), mode)})

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        return {"images": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        image_id = self.info.get_tokenizer().image_token_id
        positions = [image_id] * self.info.get_hf_config().geometry().tokens_per_image
        return [PromptReplacement(modality="image", target=[image_id], replacement=positions)]
