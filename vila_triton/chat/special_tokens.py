"""Aliases of special tokens, so that only a template can spell them and a user's text cannot.

A prompt is tokenized as one text, since a word of the user and the space of the template before it may be one token.
The two are told apart by names: in an otherwise equal tokenizer, special tokens have names that are drawn anew in every
process and that nobody can know, and the template is rendered with these.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .templates import ChatTemplate, is_single_token

PROCESS_SECRET = secrets.token_hex(8)  # token ids do not depend on it


@dataclass(frozen=True)
class SpecialTokenAliases:
    """The alias of each special token, and a function that encodes a text in which they are spelled so."""

    aliases: Mapping[str, str]
    encode: Callable[[str], list[int]]


def special_token_ids(tokenizer: Any, template: ChatTemplate) -> dict[str, int]:
    """Return the ids of the special tokens of a tokenizer and of a template, by their texts."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    of_template = [t for t in (*template.required_tokens, *template.stop_strings) if is_single_token(t, tokenizer)]
    texts = (*tokenizer.all_special_tokens, *added, *of_template)
    return {text: tokenizer.convert_tokens_to_ids(text) for text in texts}


def alias_special_tokens(tokenizer: Any, template: ChatTemplate) -> SpecialTokenAliases:
    """Return aliases for the special tokens of a tokenizer and a template; the latest four are cached."""
    return build_aliases(tokenizer, tuple(sorted(special_token_ids(tokenizer, template).items())), len(tokenizer))


@lru_cache(4)
def build_aliases(tokenizer: Any, special_ids: tuple[tuple[str, int], ...], vocab_size: int) -> SpecialTokenAliases:
    """Return aliases for these special tokens; `vocab_size` is only a cache key, so that added tokens are noticed."""
    aliases = {text: f"<{PROCESS_SECRET}:{i}>" for text, i in special_ids}
    alias_ids = {aliases[text]: i for text, i in special_ids}
    make_encoder = tokenizers_encoder if tokenizer.is_fast else sentencepiece_encoder
    return SpecialTokenAliases(aliases, make_encoder(tokenizer, aliases, alias_ids))


def sentencepiece_encoder(
    tokenizer: Any, aliases: Mapping[str, str], alias_ids: Mapping[str, int]
) -> Callable[[str], list[int]]:
    """Return the encoder of a `LlamaTokenizer`; special pieces become control pieces, which no text can be."""
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
    """Return the encoder of a tokenizer of the tokenizers library, rebuilt with the aliases."""
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
