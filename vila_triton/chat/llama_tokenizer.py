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

SPACE = "▁"
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class LlamaTokenizer(SentencePieceBackend):
    """Of the name that transformers gives it, which is what `save_pretrained` writes."""

    model_input_names: ClassVar = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        extra_special_tokens: list[str | AddedToken] | None = None,
        **more: Any,
    ):
        self.adds = {"add_bos_token": add_bos_token, "add_eos_token": add_eos_token}
        more = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | more
        self.named = {str(more[name]) for name in NAMED if more.get(name)} | {*map(str, extra_special_tokens or ())}
        super().__init__(
            vocab_file=vocab_file,
            extra_special_tokens=extra_special_tokens,
            legacy=False,
            special_tokens_pattern={(True, True): "bos_eos", (True, False): "bos", (False, True): "eos"}.get(
                (add_bos_token, add_eos_token), "none"
            ),
            **more,
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **more: Any) -> tuple[str, ...]:
        """As transformers does, and what it leaves out: which tokens are added."""
        files = super().save_pretrained(save_directory, *args, **more)
        config = Path(save_directory) / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | self.adds, indent=2, sort_keys=True) + "\n")
        return files

    def get_vocab(self) -> dict[str, int]:
        ids = [i for i in range(self.vocab_size) if i not in self._added_tokens_decoder]
        return {**dict(zip(self.sp_model.id_to_piece(ids), ids)), **self._added_tokens_encoder}

    def tokenize(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, text: str, split_special_tokens: bool = False, **more: Any
    ) -> list[str]:
        marks = {} if split_special_tokens else self._added_tokens_encoder
        return self.convert_ids_to_tokens(self.spell(text, marks, self.sp_model))

    def spell(self, text: str, marks: Mapping[str, int], model: SentencePieceProcessor) -> list[int]:
        """Ids of a text in which `marks` are tokens, and everything else is what the model makes of it."""
        if not text:
            return []
        parts = self._parts(SPACE + text.replace(SPACE, " "), marks)
        if len(parts) > 1 and parts[0] == SPACE and self.convert_ids_to_tokens(marks[parts[1]]) in self.named:
            parts = parts[1:]
        return [i for part in parts for i in ([marks[part]] if part in marks else self._pieces(part, model))]

    def _parts(self, text: str, marks: Mapping[str, int]) -> list[str]:
        """The text cut at its marks, of which the longest counts, and which may take spaces beside them away."""
        if not marks:
            return [text]
        parts = re.split(f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})", text)
        for i in range(1, len(parts), 2):
            token = self._added_tokens_decoder.get(marks[parts[i]])
            if token and token.rstrip:
                parts[i + 1] = parts[i + 1].lstrip()
            if token and token.lstrip:
                parts[i - 1] = parts[i - 1].rstrip()
        return [part for part in parts if part]

    def _pieces(self, text: str, model: SentencePieceProcessor) -> list[int]:
        if not text.startswith((SPACE, " ")) or model.normalize("  a") == f"{SPACE}{SPACE}a":
            return model.encode(text)
        before = str(self.unk_token)  # a model that takes leading spaces away keeps them behind any other text
        return model.encode(before + text)[len(model.encode(before)) :]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text, run = "", list[str]()
        for i, token in enumerate([*tokens, None]):
            if i == 0 and token is not None and token.startswith(SPACE):
                token = token.removeprefix(SPACE)  # the space that every text is given
            if token is None or token in self._added_tokens_encoder:
                text += self.sp_model.decode(run) + (token or "")
                run = []
            elif token:
                run.append(token)
        return text
