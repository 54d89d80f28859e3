"""Conversations on disk: one safetensors file with JSON in its header, so that nothing in it is code.

It holds the spliced tokens and the picture features; keys and values are computed again when the conversation goes on.
Pictures are then known by their features: a file cannot pass others off as those of a picture that somebody asks about.
"""

import os
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..images.feature_cache import image_hash, image_token_key
from .conversation import ChatModel, Conversation

FILE_FORMAT = "vila-triton conversation 1"


class ConversationFileError(ValueError):
    """A file is not a conversation that this model can go on with."""


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Write a conversation; the file is there whole or not at all. Errors: `SavedError` rather than replace another."""
    try:
        exists = path.exists()
    except OSError as error:
        raise ConversationFileError(f"{path} cannot be written: {error.strerror}") from None
    if exists:
        try:
            read_conversation_file(path)
        except ConversationFileError:
            raise ConversationFileError(f"{path} exists and is not a saved conversation; choose another name") from None
    tensors = {"row": conversation.spliced_ids.cpu()}
    if conversation.image_features is not None:
        tensors["features"] = conversation.image_features.cpu()
    metadata = {"format": FILE_FORMAT, **fingerprints(conversation.chat_model)}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # another may be writing the same
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ConversationFileError(f"{path} cannot be written: {error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_conversation(chat_model: ChatModel, path: Path) -> Conversation:
    """The conversation in a file, to go on with the model it was held with.

    Errors: `SavedError` if the file is none, or is of another model, tokenizer or template.
    """
    tensors, metadata = read_conversation_file(path)
    for subject, expected in fingerprints(chat_model).items():
        if metadata.get(subject) != expected:
            raise ConversationFileError(
                f"{path} is a conversation with another {subject}; resume it with the one it was held with"
            )
    try:
        spliced_ids, image_features = tensors["row"], tensors.get("features")
    except KeyError:
        raise ConversationFileError(f"{path} is a damaged conversation: it lacks its tokens") from None
    llm, num_features = chat_model.model.vila_config.llm, len(image_features) if image_features is not None else 0
    shape_fits = image_features is None or image_features.shape[1:] == (llm.hidden_size,)
    ids_in_range = (
        spliced_ids.dtype == torch.int64
        and spliced_ids.ndim == 1
        and bool(((spliced_ids >= -num_features) & (spliced_ids < llm.vocab_size)).all())
    )
    if not (shape_fits and ids_in_range):
        raise ConversationFileError(f"{path} is a damaged conversation: its tokens and pictures do not belong together")
    conversation = Conversation(chat_model)
    conversation.spliced_ids = spliced_ids.to(chat_model.model.device)
    conversation.image_features = image_features.to(chat_model.model.device) if image_features is not None else None
    conversation.feature_keys = (
        [image_token_key(image_hash(x), 0) for x in image_features] if image_features is not None else []
    )
    conversation.model_state = chat_model.memory.current().model_state
    return conversation


def read_conversation_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a saved conversation and what its header says. Errors: `SavedError`."""
    if not path.exists():
        raise ConversationFileError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        raise ConversationFileError(f"{path} is not a saved conversation; /save writes them") from None
    if metadata.get("format") != FILE_FORMAT:
        raise ConversationFileError(f"{path} is not a saved conversation; /save writes them")
    return tensors, metadata


def fingerprints(chat_model: ChatModel) -> dict[str, str]:
    """What a conversation depends on, as digests; of each parameter 64 numbers count."""
    parameters = chat_model.model.state_dict().values()
    samples = [x.flatten()[:: max(1, x.numel() // 64)].contiguous().view(torch.uint8) for x in parameters]
    vocabulary: Any = (sorted(chat_model.tokenizer.get_vocab().items()), chat_model.tokenizer.special_tokens_map)
    return {
        "model": blake2b_hex(repr(chat_model.model.vila_config).encode() + torch.cat(samples).cpu().numpy().tobytes()),
        "tokenizer": blake2b_hex(repr(vocabulary).encode()),
        "template": blake2b_hex(repr(chat_model.template).encode()),
    }


def blake2b_hex(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
