"""Stop strings: end a generation when the text ends in one of several strings, with any tokenizer."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria

MAX_TOKENS_PER_CHARACTER = 4  # one for each byte of UTF-8


class StopStrings(StoppingCriteria):
    """Stops a sequence when its last token completes one of the stop strings.

    Tokens are decoded and compared as text. transformers' own criterion reads the vocabulary's spelling of spaces, and
    fails where there is none. Errors: ValueError for an empty string or without a tokenizer.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]):
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not self.stop_strings or not all(isinstance(text, str) and text for text in self.stop_strings):
            raise ValueError(f"stop_strings is {stop_strings!r}, expected a text or several, none of them empty")
        if tokenizer is None:
            raise ValueError("stop_strings need tokenizer=, which decodes tokens")
        self.tokenizer, self.window = tokenizer, MAX_TOKENS_PER_CHARACTER * (max(map(len, self.stop_strings)) + 1)

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:  # pyright: ignore
        return torch.tensor([self.completes_stop_string(row) for row in input_ids.tolist()], device=input_ids.device)

    def completes_stop_string(self, row: list[int]) -> bool:
        """Return whether the last of the token ids completes a stop string."""
        row = row[-self.window :]
        previous, current = self.tokenizer.decode(row[:-1]), self.tokenizer.decode(row)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(previous, current))
        common = sum(1 for _ in same)
        ends = range(common + 1, len(current) + 1)
        return any(current.endswith(text, 0, end) for text in self.stop_strings for end in ends)


class PadStoppedRows(StoppingCriteria):
    """Stops nothing. Beside it, transformers' loop pads a sequence that any criterion has stopped, which it otherwise
    does only if there are stop tokens: it looks for a criterion with `eos_token_id`.
    """

    eos_token_id = None

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:  # pyright: ignore
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
