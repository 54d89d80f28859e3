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

from ..images.feature_cache import fingerprint, name
from .conversation import Conversation, Talker

FORMAT = "vila-triton conversation 1"


class SavedError(ValueError):
    """A file is not a conversation that this model can go on with."""


def save(conversation: Conversation, path: Path) -> None:
    """Write a conversation; the file is there whole or not at all. Errors: `SavedError` rather than replace another."""
    try:
        there = path.exists()
    except OSError as error:
        raise SavedError(f"{path} cannot be written: {error.strerror}") from None
    if there:
        try:
            read(path)
        except SavedError:
            raise SavedError(f"{path} exists and is not a saved conversation; choose another name") from None
    tensors = {"row": conversation.row.cpu()}
    if conversation.features is not None:
        tensors["features"] = conversation.features.cpu()
    about = {"format": FORMAT, **prints(conversation.talker)}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")  # another may be writing the same
    try:
        save_file(tensors, unfinished, about)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise SavedError(f"{path} cannot be written: {error}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()


def resume(talker: Talker, path: Path) -> Conversation:
    """The conversation in a file, to go on with the model it was held with.

    Errors: `SavedError` if the file is none, or is of another model, tokenizer or template.
    """
    tensors, about = read(path)
    for what, mine in prints(talker).items():
        if about.get(what) != mine:
            raise SavedError(f"{path} is a conversation with another {what}; resume it with the one it was held with")
    try:
        row, features = tensors["row"], tensors.get("features")
    except KeyError:
        raise SavedError(f"{path} is a damaged conversation: it lacks its tokens") from None
    llm, held = talker.model.geometry.llm, len(features) if features is not None else 0
    fits = features is None or features.shape[1:] == (llm.hidden_size,)
    inside = row.dtype == torch.int64 and row.ndim == 1 and bool(((row >= -held) & (row < llm.vocab_size)).all())
    if not (fits and inside):
        raise SavedError(f"{path} is a damaged conversation: its tokens and pictures do not belong together")
    conversation = Conversation(talker)
    conversation.row = row.to(talker.model.device)
    conversation.features = features.to(talker.model.device) if features is not None else None
    conversation.names = [name(fingerprint(x), 0) for x in features] if features is not None else []
    conversation.eyes = talker.memory.holding().eyes
    return conversation


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a saved conversation and what its header says. Errors: `SavedError`."""
    if not path.exists():
        raise SavedError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        raise SavedError(f"{path} is not a saved conversation; /save writes them") from None
    if about.get("format") != FORMAT:
        raise SavedError(f"{path} is not a saved conversation; /save writes them")
    return tensors, about


def prints(talker: Talker) -> dict[str, str]:
    """What a conversation depends on, as digests; of each parameter 64 numbers count."""
    parameters = talker.model.state_dict().values()
    sample = [x.flatten()[:: max(1, x.numel() // 64)].contiguous().view(torch.uint8) for x in parameters]
    words: Any = (sorted(talker.tokenizer.get_vocab().items()), talker.tokenizer.special_tokens_map)
    return {
        "model": digest(repr(talker.model.geometry).encode() + torch.cat(sample).cpu().numpy().tobytes()),
        "tokenizer": digest(repr(words).encode()),
        "template": digest(repr(talker.template).encode()),
    }


def digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
