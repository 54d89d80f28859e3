"""Save a conversation to a safetensors file, which can hold no code, and load it again.

The file has the spliced ids and the image features as tensors, and fingerprints of model, tokenizer and template in its
header. Keys and values are computed again when the conversation goes on. Images of a loaded conversation are known to
the prefix cache by their features, so that a file cannot pass features off as those of an image that is asked about.
"""

import os
import sys
from contextlib import suppress
from dataclasses import astuple
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..images.feature_cache import image_hash, image_token_key
from .conversation import ChatModel, Conversation

FILE_FORMAT = "vila-triton conversation 2"
OLD_FORMAT = "vila-triton conversation 1"  # read for one more release
OLD_TENSORS = {"row": "spliced_ids", "features": "image_features"}
OLD_NAMES = {  # in the texts that fingerprints were made of: new name -> old name
    "ChatTemplate(": "Template(",
    "user_prefix=": "user=",
    "assistant_prefix=": "assistant=",
    "answer_prefix=": "lead=",
    "turn_end=": "end=",
    "stop_strings=": "stops=",
    "conversation_end=": "finish=",
    "rounding=": "order=",
    "dense_linears=": "dense=",
}


class ConversationFileError(ValueError):
    """A file is not a conversation that this model can continue, or cannot be written."""


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Write a conversation atomically. Errors: `ConversationFileError`, also for an existing file of another kind."""
    try:
        exists = path.exists()
    except OSError as error:
        raise ConversationFileError(f"{path} cannot be written: {error.strerror}") from None
    if exists:
        try:
            read_conversation_file(path)
        except ConversationFileError:
            raise ConversationFileError(f"{path} exists and is not a saved conversation; choose another name") from None
    tensors = {"spliced_ids": conversation.spliced_ids.cpu()}
    if conversation.image_features is not None:
        tensors["image_features"] = conversation.image_features.cpu()
    metadata = {"format": FILE_FORMAT, **fingerprints(conversation.chat_model)}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may be writing the same file
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ConversationFileError(f"{path} cannot be written: {error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_conversation(chat_model: ChatModel, path: Path) -> Conversation:
    """Load a conversation, saved with the same model, tokenizer and template. Errors: `ConversationFileError`."""
    tensors, metadata = read_conversation_file(path)
    for subject, expected in fingerprints(chat_model, metadata["format"]).items():
        if metadata.get(subject) != expected:
            raise ConversationFileError(
                f"{path} is a conversation with another {subject}; resume it with the one it was held with"
            )
    try:
        spliced_ids, image_features = tensors["spliced_ids"], tensors.get("image_features")
    except KeyError:
        raise ConversationFileError(f"{path} is a damaged conversation: it lacks its tokens") from None
    llm, num_features = chat_model.model.vila_config.llm, len(image_features) if image_features is not None else 0
    is_whole = (
        (image_features is None or image_features.shape[1:] == (llm.hidden_size,))
        and spliced_ids.dtype == torch.int64
        and spliced_ids.ndim == 1
        and bool(((spliced_ids >= -num_features) & (spliced_ids < llm.vocab_size)).all())
    )
    if not is_whole:
        raise ConversationFileError(f"{path} is a damaged conversation: its tokens and images do not belong together")
    if metadata["format"] == OLD_FORMAT:
        print(f"note: {path} has the format of an older release; save it again to keep it readable", file=sys.stderr)
    conversation = Conversation(chat_model)
    conversation.spliced_ids = spliced_ids.to(chat_model.model.device)
    if image_features is not None:
        conversation.image_features = image_features.to(chat_model.model.device)
        conversation.feature_keys = [image_token_key(image_hash(row), 0) for row in image_features]
    conversation.model_state = chat_model.memory.current().model_state
    return conversation


def read_conversation_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a saved conversation. Errors: `ConversationFileError`."""
    if not path.exists():
        raise ConversationFileError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        raise ConversationFileError(f"{path} is not a saved conversation; /save writes them") from None
    if metadata.get("format") == OLD_FORMAT:
        tensors = {OLD_TENSORS.get(name, name): x for name, x in tensors.items()}
        return tensors, metadata
    if metadata.get("format") != FILE_FORMAT:
        raise ConversationFileError(f"{path} is not a saved conversation; /save writes them")
    return tensors, metadata


def fingerprints(chat_model: ChatModel, file_format: str = FILE_FORMAT) -> dict[str, str]:
    """Return hashes of what a conversation depends on: of the model, the tokenizer and the template.

    Of each parameter only some 64 to 127 evenly spaced elements are hashed (all, if it has fewer), so a change
    elsewhere goes unnoticed.
    """
    model, tokenizer = chat_model.model, chat_model.tokenizer
    parameters = model.state_dict().values()
    samples = [x.flatten()[:: max(1, x.numel() // 64)].contiguous().view(torch.uint8) for x in parameters]
    vocabulary = (sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map)
    describe = describe_as_before if file_format == OLD_FORMAT else lambda x: repr(astuple(x))
    return {
        "model": blake2b_hex(describe(model.vila_config).encode() + torch.cat(samples).cpu().numpy().tobytes()),
        "tokenizer": blake2b_hex(repr(vocabulary).encode()),
        "template": blake2b_hex(describe(chat_model.template).encode()),
    }


def describe_as_before(x: Any) -> str:
    """Return the repr of a dataclass under the names that it had in the old file format."""
    text = repr(x)
    for new, old in OLD_NAMES.items():
        text = text.replace(new, old)
    return text


def blake2b_hex(content: bytes) -> str:
    """Return the 128-bit BLAKE2b hash of the content as 32 hex digits."""
    return blake2b(content, digest_size=16).hexdigest()
