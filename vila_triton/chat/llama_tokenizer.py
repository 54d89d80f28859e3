"""LLaMA's tokenizer over its SentencePiece model, with the ids that VILA was trained on.

VILA reads `tokenizer.model` with transformers 4.36, use_fast=False and legacy=False: a space is put before every text,
but not before text right behind a special token, and no space of the text is lost. transformers 5 converts the model to
a tokenizer of byte pairs instead, which loses a leading space.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

SPACE_SYMBOL = "▁"  # SentencePiece's
SPECIAL_TOKEN_FIELDS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class LlamaTokenizer(SentencePieceBackend):
    """LLaMA's tokenizer. It has the name of transformers' class, since `save_pretrained` writes that name."""

    model_input_names: ClassVar = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        extra_special_tokens: list[str | AddedToken] | None = None,
        **kwargs: Any,
    ):
        self.add_token_options = {"add_bos_token": add_bos_token, "add_eos_token": add_eos_token}
        kwargs = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | kwargs
        self.special_token_texts = {str(kwargs[name]) for name in SPECIAL_TOKEN_FIELDS if kwargs.get(name)}
        self.special_token_texts |= {*map(str, extra_special_tokens or ())}
        added = [name for name, adds in (("bos", add_bos_token), ("eos", add_eos_token)) if adds]
        super().__init__(
            vocab_file=vocab_file,
            extra_special_tokens=extra_special_tokens,
            legacy=False,
            special_tokens_pattern="_".join(added) or "none",
            **kwargs,
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write the files of transformers, with the options that it leaves out: which tokens are added."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        config = Path(save_directory) / "tokenizer_config.json"
        values = json.loads(config.read_text()) | self.add_token_options
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        return files

    def get_vocab(self) -> dict[str, int]:
        ids = [i for i in range(self.vocab_size) if i not in self._added_tokens_decoder]
        return {**dict(zip(self.sp_model.id_to_piece(ids), ids)), **self._added_tokens_encoder}

    def tokenize(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, text: str, split_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        added_tokens = {} if split_special_tokens else self._added_tokens_encoder
        return self.convert_ids_to_tokens(self.encode_with(text, added_tokens, self.sp_model))

    def encode_with(self, text: str, added_tokens: Mapping[str, int], model: SentencePieceProcessor) -> list[int]:
        """Return the ids of a text in which `added_tokens` are tokens and `model` encodes what is between them."""
        if not text:
            return []
        parts = self._split_at_tokens(SPACE_SYMBOL + text.replace(SPACE_SYMBOL, " "), added_tokens)
        if len(parts) > 1 and parts[0] == SPACE_SYMBOL:
            token = self.convert_ids_to_tokens(added_tokens[parts[1]])
            parts = parts[1:] if token in self.special_token_texts else parts
        ids: list[int] = []
        for part in parts:
            ids += [added_tokens[part]] if part in added_tokens else self._encode_text(part, model)
        return ids

    def _split_at_tokens(self, text: str, added_tokens: Mapping[str, int]) -> list[str]:
        """Split a text at added tokens, of which the longest counts; tokens may strip the spaces beside them."""
        if not added_tokens:
            return [text]
        parts = re.split(f"({'|'.join(map(re.escape, sorted(added_tokens, key=len, reverse=True)))})", text)
        for i in range(1, len(parts), 2):
            token = self._added_tokens_decoder.get(added_tokens[parts[i]])
            if token and token.rstrip:
                parts[i + 1] = parts[i + 1].lstrip()
            if token and token.lstrip:
                parts[i - 1] = parts[i - 1].rstrip()
        return [part for part in parts if part]

    def _encode_text(self, text: str, model: SentencePieceProcessor) -> list[int]:
        if not text.startswith((SPACE_SYMBOL, " ")) or model.normalize("  a") == f"{SPACE_SYMBOL}{SPACE_SYMBOL}a":
            return model.encode(text)
        prefix = str(self.unk_token)  # a model that strips leading spaces keeps them behind a prefix
        return model.encode(prefix + text)[len(model.encode(prefix)) :]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text, pieces = "", list[str]()
        for i, token in enumerate([*tokens, None]):
            if i == 0 and token is not None and token.startswith(SPACE_SYMBOL):
                token = token.removeprefix(SPACE_SYMBOL)  # the space that was put before the text
            if token is None or token in self._added_tokens_encoder:
                text += self.sp_model.decode(pieces) + (token or "")
                pieces = []
            elif token:
                pieces.append(token)
        return text
