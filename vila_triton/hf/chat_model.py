"""Load a `ChatModel` from a checkpoint folder."""

from pathlib import Path

import torch

from ..chat.conversation import ChatModel
from ..chat.tokenizer import load_tokenizer
from ..images.processing import load_image_processor
from ..models.config_fields import ConfigError
from .modeling_vila_llama import VilaLlamaForCausalLM


def load_chat_model(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    max_pages: int | None = None,
) -> ChatModel[VilaLlamaForCausalLM]:
    """Load model, tokenizer and image processor of a VILA or LLaVA-1.5 folder.

    max_pages: caps the KV pages of its conversations.

    Errors: `LoadError` for broken files, `ConfigError` for wrong configs, one of them a conversation template that does
    not fit the tokenizer.
    """
    model = VilaLlamaForCausalLM.from_pretrained(folder, device=device, dtype=dtype)
    chat_model = ChatModel(model, load_tokenizer(Path(folder)), load_image_processor(Path(folder)), max_pages)
    try:
        _ = chat_model.template  # resolved now, so that an error names the folder
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return chat_model
