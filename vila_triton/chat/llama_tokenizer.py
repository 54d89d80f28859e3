"""LLaMA's tokenizer over its SentencePiece model, with the ids that VILA was trained on.

VILA reads `tokenizer.model` by transformers 4.36 with use_fast=False and legacy=False: every text begins with one more
space, what stands right behind a special token does not, and no space of the text is ever lost. transformers 5 turns
the model into another kind of tokenizer instead, which knows byte pairs only and loses a leading space.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

SPACE_SYMBOL = "▁"
SPECIAL_TOKEN_FIELDS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class LlamaTokenizer(SentencePieceBackend):
    """Of the name that transformers gives it, which is what `save_pretrained` writes."""

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
        self.special_token_texts = {str(kwargs[name]) for name in SPECIAL_TOKEN_FIELDS if kwargs.get(name)} | {
            *map(str, extra_special_tokens or ())
        }
        super().__init__(
            vocab_file=vocab_file,
            extra_special_tokens=extra_special_tokens,
            legacy=False,
            special_tokens_pattern={(True, True): "bos_eos", (True, False): "bos", (False, True): "eos"}.get(
                (add_bos_token, add_eos_token), "none"
            ),
            **kwargs,
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As transformers does, and what it leaves out: which tokens are added."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        config = Path(save_directory) / "tokenizer_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | self.add_token_options, indent=2, sort_keys=True) + "\n"
        )
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
        """Ids of a text in which `marks` are tokens, and everything else is what the model makes of it."""
        if not text:
            return []
        parts = self._split_at_tokens(SPACE_SYMBOL + text.replace(SPACE_SYMBOL, " "), added_tokens)
        if (
            len(parts) > 1
            and parts[0] == SPACE_SYMBOL
            and self.convert_ids_to_tokens(added_tokens[parts[1]]) in self.special_token_texts
        ):
            parts = parts[1:]
        return [
            i
            for part in parts
            for i in ([added_tokens[part]] if part in added_tokens else self._encode_text(part, model))
        ]

    def _split_at_tokens(self, text: str, added_tokens: Mapping[str, int]) -> list[str]:
        """The text cut at its marks, of which the longest counts, and which may take spaces beside them away."""
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
        prefix = str(self.unk_token)  # a model that takes leading spaces away keeps them behind any other text
        return model.encode(prefix + text)[len(model.encode(prefix)) :]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text, pieces = "", list[str]()
        for i, token in enumerate([*tokens, None]):
            if i == 0 and token is not None and token.startswith(SPACE_SYMBOL):
                token = token.removeprefix(SPACE_SYMBOL)  # the space that every text is given
            if token is None or token in self._added_tokens_encoder:
                text += self.sp_model.decode(pieces) + (token or "")
                pieces = []
            elif token:
                pieces.append(token)
        return text
