"""VILA as a multimodal model of vLLM: the vision tower and projector of this project before vLLM's LLaMA."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..engine.engine import encode_images
from ..models import vila
from ..models.config import LlamaConfig
from .attention import choose_attention
from .int4_linear import Int4Config
from .kernel_choices import kernel_choices
from .loading import language_model_weights, vision_parameters
from .processing import VilaDummyInputs, VilaMultiModalProcessor, VilaProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(VilaMultiModalProcessor, info=VilaProcessingInfo, dummy_inputs=VilaDummyInputs)
class VilaForVllm(nn.Module, SupportsMultiModal, SupportsPP):
    """VILA with vLLM's LLaMA, which vLLM shards and batches; every rank has the whole vision tower and projector."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The text of an image in a prompt. Errors: ValueError for other media."""
        if modality.startswith("image"):
            return "<image>"
        raise ValueError(f"VILA is asked about images, not {modality}")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        self.folder, self.dtype = Path(model_config.model), model_config.dtype
        self.cfg = self.config.geometry()
        self.choices = kernel_choices(vllm_config)
        choose_attention(vllm_config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=with_int4_linears(vllm_config, self.cfg.llm),
                hf_config=self.config.get_text_config(),
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the folder. `weights` is not advanced: vLLM looks for them beside config.json, a VILA folder has a
        folder for each part.
        """
        device = next(self.language_model.parameters()).device
        self.tower, self.projector = vision_parameters(self.folder, self.cfg, self.dtype, device)
        vocab_size = self.config.get_text_config().vocab_size
        weights = language_model_weights(self.folder, self.cfg, self.dtype, vocab_size)
        loaded = self.language_model.load_weights(weights)
        return {f"language_model.{name}" for name in loaded}

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """Image features [tokens, e] of each image, of pixels [n, c, H, W]."""
        pixels = kwargs.get("images")
        if pixels is None:
            return ()
        pixels = torch.stack([*pixels]).to(self.dtype)
        params = vila.Vila(None, self.tower, self.projector)  # pyright: ignore[reportArgumentType]
        with self.choices.active(pixels.device, "prefill"):
            return encode_images(params, pixels, self.cfg).unbind()

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [s, e] of new tokens at positions [s]."""
        embeddings = None if intermediate_tensors is not None else inputs_embeds
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=embeddings)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [s, v] of hidden states [s, e]; those of tokens that are not the model's are -inf."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:  # None on ranks that do not sample
            logits[:, self.cfg.llm.vocab_size :] = -torch.inf
        return logits


def with_int4_linears(vllm_config: VllmConfig, cfg: LlamaConfig) -> VllmConfig:
    """The config for a language model whose linears are int4 where those of the folder are.

    Who names a `quantization_config` in vLLM's `--hf-overrides` gets that one, to compare, such as vLLM's AWQ.
    """
    overrides = vllm_config.model_config.hf_overrides
    if not cfg.group_size or (isinstance(overrides, dict) and "quantization_config" in overrides):
        return vllm_config
    quant_config = Int4Config(cfg.group_size, cfg.rounding, cfg.dense_linears)
    quant_config.packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping
    vllm_config = copy.copy(vllm_config)
    vllm_config.quant_config = quant_config
    return vllm_config
