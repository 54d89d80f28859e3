"""Texts that end an answer, whatever the tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria

BYTES = 4  # tokens that the longest character may take


class StopStrings(StoppingCriteria):
    """Ends a row when its last token completes one of the texts.

    The tokens are decoded, and nothing else is asked of a tokenizer; transformers' own criterion looks for the spelling
    of spaces in the vocabulary, and fails where there is none.
    """

    def __init__(self, tokenizer: Any, texts: str | Sequence[str]):
        self.texts = [texts] if isinstance(texts, str) else list(texts)
        if not self.texts or not all(isinstance(text, str) and text for text in self.texts):
            raise ValueError(f"stop_strings is {texts!r}, expected a text or several, none of them empty")
        if tokenizer is None:
            raise ValueError("stop_strings need tokenizer=, to know how tokens spell them")
        self.tokenizer, self.window = tokenizer, BYTES * (max(map(len, self.texts)) + 1)

    def __call__(self, input_ids: Tensor, scores: Any = None, **more: Any) -> Tensor:  # pyright: ignore
        return torch.tensor([self.ends(row) for row in input_ids.tolist()], device=input_ids.device)

    def ends(self, row: list[int]) -> bool:
        before, after = (self.tokenizer.decode(tokens) for tokens in (row[-self.window : -1], row[-self.window :]))
        alike = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
        return any(after.endswith(text, 0, end) for text in self.texts for end in range(alike + 1, len(after) + 1))
