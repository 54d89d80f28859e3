"""On a GPU: answers of steps that are replayed as graphs are, bit by bit, those of the loop that has none."""

from typing import Any

import pytest
import torch
from hf_reference import build, padded

from vila_triton.registry import count_calls

ROWS = [[1, 5, 9, 30], [1, 7, 8], [44]]
SAMPLED = {"do_sample": True, "seed": 3, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}


def unchanged(ids: Any, scores: Any) -> Any:
    """A logits processor that only needs scores to be there."""
    return scores


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_replayed_answers_are_those_of_the_open_loop(kv_dtype: str | None, how: dict[str, Any]) -> None:
    model: Any = build(dtype=torch.float32, seed=2, gain=2.0, attention_numerics="batch_invariant")
    model = model.cuda()
    model.config.kv_dtype = kv_dtype
    ids, mask = (x.cuda() for x in padded(ROWS))
    given = {"attention_mask": mask, "max_new_tokens": 20, "eos_token_id": [60, 52], **how}
    with count_calls() as replayed:
        found = model.generate(ids, **given)
    with count_calls() as expected:
        assert torch.equal(found, model.generate(ids, logits_processor=[unchanged], **given))
    assert replayed.keys() == expected.keys()
