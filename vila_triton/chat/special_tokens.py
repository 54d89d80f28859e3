"""What only a template may say: special tokens, which a user's text cannot spell.

A prompt is tokenized as one text, since a word and the space before it may come from the two sides. So what the
template says is told from what a user types by its names: in a tokenizer that is otherwise the same, special tokens
have names that are drawn anew in every process and that nobody can know, and a template is written with those.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .templates import ChatTemplate, is_single_token

PROCESS_SECRET = secrets.token_hex(8)  # no id depends on it


@dataclass(frozen=True)
class SpecialTokenAliases:
    """By text of a special token its name, and the ids of a text that is written with those."""

    aliases: Mapping[str, str]
    encode: Callable[[str], list[int]]


def special_token_ids(tokenizer: Any, template: ChatTemplate) -> dict[str, int]:
    """The special tokens of a tokenizer and those of a template, by their texts."""
    added_special_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    template_tokens = [
        text for text in (*template.required_tokens, *template.stop_strings) if is_single_token(text, tokenizer)
    ]
    return {
        text: tokenizer.convert_tokens_to_ids(text)
        for text in (*tokenizer.all_special_tokens, *added_special_tokens, *template_tokens)
    }


def alias_special_tokens(tokenizer: Any, template: ChatTemplate) -> SpecialTokenAliases:
    """A tokenizer whose special tokens, and those of a template, have other names; the latest few are kept."""
    return build_aliases(tokenizer, tuple(sorted(special_token_ids(tokenizer, template).items())), len(tokenizer))


@lru_cache(4)
def build_aliases(tokenizer: Any, special_ids: tuple[tuple[str, int], ...], vocab_size: int) -> SpecialTokenAliases:
    aliases = {text: f"<{PROCESS_SECRET}:{i}>" for text, i in special_ids}
    alias_ids = {aliases[text]: i for text, i in special_ids}
    return SpecialTokenAliases(
        aliases, (tokenizers_encoder if tokenizer.is_fast else sentencepiece_encoder)(tokenizer, aliases, alias_ids)
    )


def sentencepiece_encoder(
    tokenizer: Any, aliases: Mapping[str, str], alias_ids: Mapping[str, int]
) -> Callable[[str], list[int]]:
    """The ids of LLaMA's tokenizer. Pieces of the model that are special tokens are made what no text is."""
    from sentencepiece import SentencePieceProcessor
    from transformers.convert_slow_tokenizer import import_protobuf

    added_tokens = {text: i for text, i in tokenizer.get_added_vocab().items() if text not in aliases} | dict(alias_ids)
    proto: Any = import_protobuf()
    model = proto.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    piece_types = proto.ModelProto.SentencePiece
    for piece in model.pieces:
        if piece.piece in aliases and piece.type in (piece_types.NORMAL, piece_types.USER_DEFINED):
            piece.type = piece_types.CONTROL
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.SerializeToString())
    return lambda text: tokenizer.encode_with(text, added_tokens, processor)


def tokenizers_encoder(
    tokenizer: Any, aliases: Mapping[str, str], alias_ids: Mapping[str, int]
) -> Callable[[str], list[int]]:
    """The ids of a tokenizer of the tokenizers library, written anew with the other names."""
    from tokenizers import Tokenizer

    config = json.loads(tokenizer.backend_tokenizer.to_str())
    model = config["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {aliases.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[aliases.get(text, text), score] for text, score in model["vocab"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & aliases.keys()]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    added_tokens = {token["content"]: token for token in config["added_tokens"]}
    default_flags = {"single_word": False, "lstrip": False, "rstrip": False}
    for text, alias in aliases.items():
        flags = {"id": alias_ids[alias], "content": alias, "normalized": False, "special": True}
        added_tokens[text] = default_flags | added_tokens.get(text, {}) | flags
    config["added_tokens"] = sorted(added_tokens.values(), key=lambda token: token["id"])
    backend = Tokenizer.from_str(json.dumps(config, ensure_ascii=False))
    return lambda text: backend.encode(text, add_special_tokens=False).ids
