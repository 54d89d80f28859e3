"""Texts that end an answer, whatever the tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria

MAX_TOKENS_PER_CHARACTER = 4  # tokens that the longest character may take


class StopStrings(StoppingCriteria):
    """Ends a row when its last token completes one of the texts.

    The tokens are decoded, and nothing else is asked of a tokenizer; transformers' own criterion looks for the spelling
    of spaces in the vocabulary, and fails where there is none.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]):
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not self.stop_strings or not all(isinstance(text, str) and text for text in self.stop_strings):
            raise ValueError(f"stop_strings is {stop_strings!r}, expected a text or several, none of them empty")
        if tokenizer is None:
            raise ValueError("stop_strings need tokenizer=, to know how tokens spell them")
        self.tokenizer, self.window = tokenizer, MAX_TOKENS_PER_CHARACTER * (max(map(len, self.stop_strings)) + 1)

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:  # pyright: ignore
        return torch.tensor([self.completes_stop_string(row) for row in input_ids.tolist()], device=input_ids.device)

    def completes_stop_string(self, row: list[int]) -> bool:
        previous, current = (self.tokenizer.decode(tokens) for tokens in (row[-self.window : -1], row[-self.window :]))
        common_length = next(
            (i for i, (a, b) in enumerate(zip(previous, current)) if a != b), min(len(previous), len(current))
        )
        return any(
            current.endswith(text, 0, end)
            for text in self.stop_strings
            for end in range(common_length + 1, len(current) + 1)
        )
