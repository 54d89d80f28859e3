"""`generate` of transformers over our forward, beside our engine's, and the manners of its arguments."""

import random
from typing import Any

import pytest
import torch
from hf_reference import Oracle, build, padded, pictures
from torch import Tensor
from transformers import GenerationConfig

MODEL = build(gain=4.0)
IMAGES = pictures(MODEL, 3)
RNG = random.Random(6)
STOPS = [7, 19, 30, 44]


def prompt() -> list[int]:
    """A random one of up to 20 words, and up to 2 pictures between them."""
    row = [1, *(RNG.randrange(3, 61) for _ in range(RNG.randint(1, 20)))]
    for _ in range(RNG.choice([0, 0, 1, 2])):
        row.insert(RNG.randint(1, len(row)), -200)
    return row


PROMPTS = [prompt() for _ in range(100)]


def asked(rows: list[list[int]], side: str = "left") -> dict[str, Any]:
    ids, mask = padded(rows, side)
    n = sum(row.count(-200) for row in rows)
    return {"input_ids": ids, "attention_mask": mask, "images": IMAGES.repeat(4, 1, 1, 1)[:n] if n else None}


@pytest.mark.parametrize("batch", [1, 4])
def test_both_loops_give_the_same_greedy_answers_to_a_hundred_prompts(batch: int) -> None:
    rng, early = random.Random(batch), 0
    for start in range(0, len(PROMPTS), batch):
        inputs = asked(PROMPTS[start : start + batch], side=rng.choice(["left", "right"]))
        ours, theirs = (
            MODEL.generate(**inputs, max_new_tokens=6, eos_token_id=STOPS, loop=loop)
            for loop in ("engine", "transformers")
        )
        assert torch.equal(ours, theirs)
        early += int(torch.isin(ours[:, :5], torch.tensor(STOPS)).any(1).sum())
    assert 10 < early < 90  # answers end at their stop tokens, or after 6


@pytest.mark.parametrize(
    "how", [{"repetition_penalty": 1.7}, {"chunk_prefilling": True}, {"max_new_tokens": 1}], ids=str
)
def test_both_loops_mean_the_same_by_an_argument(how: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODEL.config, "prefill_chunk_size", 5)
    inputs = asked([*PROMPTS[:3], [-200]])
    plain = MODEL.generate(**inputs, max_new_tokens=6)
    ours = MODEL.generate(**inputs, **{"max_new_tokens": 6, **how})
    assert torch.equal(ours, MODEL.generate(**inputs, loop="transformers", **{"max_new_tokens": 6, **how}))
    assert torch.equal(ours, plain[:, : ours.shape[1]]) == ("repetition_penalty" not in how)


def test_beams_are_those_of_hugging_faces_own_llama() -> None:
    row = [1, 5, -200, 9, 30]
    how: dict[str, Any] = {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 3, "eos_token_id": 19}
    embeds = torch.stack(Oracle.of(MODEL).embeds([torch.tensor(row)], IMAGES[:1])).detach()
    theirs = Oracle.of(MODEL).llm.generate(inputs_embeds=embeds, pad_token_id=19, **how)
    both = MODEL.generate(**asked([row, [1, 40]]), loop="transformers", pad_token_id=19, **how)
    assert both.shape[0] == 6 and len({tuple(answer) for answer in both.tolist()}) == 6
    width = theirs.shape[1]
    assert torch.equal(both[:3, :width], theirs) and (both[:3, width:] == 19).all()


def test_an_output_in_full_holds_new_tokens_their_scores_and_states() -> None:
    inputs = asked([[1, 5, -200, 9], [1, 7]])
    out = MODEL.generate(
        **inputs,
        generation_config=GenerationConfig(max_new_tokens=5, return_dict_in_generate=True, output_scores=True),
        output_hidden_states=True,
        loop="transformers",
    )
    assert torch.equal(out.sequences, MODEL.generate(**inputs, max_new_tokens=5))
    assert torch.equal(torch.stack(out.scores).argmax(-1).T, out.sequences)
    of_tokens = MODEL.compute_transition_scores(out.sequences, out.scores)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(of_tokens, torch.stack(out.scores).amax(-1).T)
    assert [len(states) for states in out.hidden_states] == [3] * 5
    assert out.hidden_states[0][0].shape == (2, 12, 32) and out.hidden_states[4][2].shape == (2, 1, 32)


ONE = torch.tensor([[1, 5, -200]])
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "a loop": ({"loop": "vllm"}, "loop is 'vllm'; there are: engine, transformers"),
    "what the engine lacks": (
        {"num_beams": 2, "typo": 1},
        "'engine' does not know num_beams, typo, only max_new_t.*loop=",
    ),
    "a config for the engine": ({"generation_config": GenerationConfig()}, "does not know generation_config"),
    "what transformers lacks": ({"loop": "transformers", "typo": 1}, "not used by the model: .'typo'"),
    "another cache": (
        {"loop": "transformers", "cache_implementation": "static"},
        "does not honour cache_implementation",
    ),
    "a draft model": ({"loop": "transformers", "assistant_model": MODEL}, "does not honour assistant_model"),
    "too long": (
        {"max_new_tokens": 246},
        "prompt 0 has 11 positions with its images, and 246 .* context is 256; sho",
    ),
    "too long again": ({"loop": "transformers", "max_new_tokens": 246}, "prompt 0 has 11 .* lower max_new_tokens"),
    "one image too many": ({"images": IMAGES[:2]}, "the prompt has places for 1 images, but 2 were given"),
    "one image too few": ({"images": None}, "the prompt has places for 1 images, but 0 were given"),
}


@pytest.mark.parametrize("how, message", ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_honoured_is_refused_before_any_token(how: dict, message: str) -> None:
    def never(ids: Tensor, scores: Tensor) -> Tensor:
        raise AssertionError("a token was made")

    given = {"images": IMAGES[:1], "logits_processor": [never], **how}
    with pytest.raises(ValueError, match=message):
        MODEL.generate(ONE, **given)
