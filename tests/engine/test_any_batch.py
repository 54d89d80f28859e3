"""Sampled answers under batch-invariant numerics: a prompt with its seed has the same tokens alone and anywhere in a
batch, by static steps and by the open loop.
"""

from typing import Any

import pytest
import torch
from decode_scripts import PROMPT, unchanged
from hf_reference import build, padded
from hypothesis import given
from hypothesis import strategies as st

MODEL = build(dtype=torch.float32, seed=2, gain=2.0)
SETTINGS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.5, 1.0, 4.0])},
    optional={
        "top_k": st.sampled_from([3, 61]),
        "top_p": st.sampled_from([0.3, 0.9]),
        "repetition_penalty": st.sampled_from([0.7, 1.5]),
    },
)


def generate(rows: list[list[int]], seeds: list[int], **how: Any) -> list[list[int]]:
    """The answers up to their stop token, 60, which none of the prompts has."""
    ids, mask = padded(rows, "left")
    options: dict[str, Any] = {"do_sample": True, "seed": seeds, "max_new_tokens": 5, "eos_token_id": 60, **how}
    answers = MODEL.generate(ids, attention_mask=mask, **options).tolist()
    return [answer[: answer.index(60) + 1] if 60 in answer else answer for answer in answers]


@given(st.lists(st.tuples(PROMPT, st.integers(0, 2**63 - 1)), min_size=2, max_size=3), SETTINGS, st.randoms())
def test_tokens_of_a_seed_are_the_same_in_any_batch(pairs: list[tuple[list[int], int]], how: Any, order: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MODEL.config, "attention_numerics", "batch_invariant")
        alone = [generate([row], [seed], **how)[0] for row, seed in pairs]
        shuffled = [*zip(pairs, alone)]
        order.shuffle(shuffled)
        (rows, seeds), expected = zip(*(pair for pair, _ in shuffled)), [answer for _, answer in shuffled]
        assert generate([*rows], [*seeds], **how) == expected
        assert generate([*rows], [*seeds], logits_processor=[unchanged], **how) == expected
