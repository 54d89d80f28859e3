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

from .templates import Template, is_token

SECRET = secrets.token_hex(8)  # no id depends on it


@dataclass(frozen=True)
class Names:
    """By text of a special token its name, and the ids of a text that is written with those."""

    of: Mapping[str, str]
    ids: Callable[[str], list[int]]


def control(tokenizer: Any, template: Template) -> dict[str, int]:
    """The special tokens of a tokenizer and those of a template, by their texts."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    own = [text for text in (*template.tokens, *template.stops) if is_token(text, tokenizer)]
    return {text: tokenizer.convert_tokens_to_ids(text) for text in (*tokenizer.all_special_tokens, *special, *own)}


def renamed(tokenizer: Any, template: Template) -> Names:
    """A tokenizer whose special tokens, and those of a template, have other names; the latest few are kept."""
    return names_for(tokenizer, tuple(sorted(control(tokenizer, template).items())), len(tokenizer))


@lru_cache(4)
def names_for(tokenizer: Any, special: tuple[tuple[str, int], ...], size: int) -> Names:
    names = {text: f"<{SECRET}:{i}>" for text, i in special}
    by_name = {names[text]: i for text, i in special}
    return Names(names, (in_json if tokenizer.is_fast else in_pieces)(tokenizer, names, by_name))


def in_pieces(tokenizer: Any, names: Mapping[str, str], by_name: Mapping[str, int]) -> Callable[[str], list[int]]:
    """The ids of LLaMA's tokenizer. Pieces of the model that are special tokens are made what no text is."""
    from sentencepiece import SentencePieceProcessor
    from transformers.convert_slow_tokenizer import import_protobuf

    marks = {text: i for text, i in tokenizer.get_added_vocab().items() if text not in names} | dict(by_name)
    proto: Any = import_protobuf()
    model = proto.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    kinds = proto.ModelProto.SentencePiece
    for piece in model.pieces:
        if piece.piece in names and piece.type in (kinds.NORMAL, kinds.USER_DEFINED):
            piece.type = kinds.CONTROL
    pieces = SentencePieceProcessor()
    pieces.LoadFromSerializedProto(model.SerializeToString())
    return lambda text: tokenizer.spell(text, marks, pieces)


def in_json(tokenizer: Any, names: Mapping[str, str], by_name: Mapping[str, int]) -> Callable[[str], list[int]]:
    """The ids of a tokenizer of the tokenizers library, written anew with the other names."""
    from tokenizers import Tokenizer

    values = json.loads(tokenizer.backend_tokenizer.to_str())
    model = values["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = {token["content"]: token for token in values["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    for text, name in names.items():
        flags = {"id": by_name[name], "content": name, "normalized": False, "special": True}
        added[text] = plain | added.get(text, {}) | flags
    values["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    backend = Tokenizer.from_str(json.dumps(values, ensure_ascii=False))
    return lambda text: backend.encode(text, add_special_tokens=False).ids
