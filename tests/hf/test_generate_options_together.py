"""`generate`'s options together: in rows in which every two values of different options meet, the answers are those
that the plain pass gives, run on the whole sequence for every token; options that exclude each other are one error.
"""

import string
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import pytest
import sampling_oracle
import torch
from hf_reference import build, padded, pictures, words
from plain_pass import Step, embed_row, plain_pass, steps_of_batch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from bench.correctness.covering_array import Row, pairwise_rows
from vila_triton import use
from vila_triton.registry import OPS, count_calls

MODEL = build(gain=4.0)
PARAMS, CFG = MODEL.params, MODEL.vila_config
IMAGES = pictures(MODEL, 3)
SPELLING = dict(zip(string.ascii_letters + string.digits, range(61)))
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab=SPELLING, merges=[])))
TOKENIZER.backend_tokenizer.decoder = decoders.Fuse()
PROMPTS = {"one": (6,), "several": (6, 1, 3), "single tokens": (1, 1)}
SEED, DEFAULT_STOP = 11, 2
FAVORED = torch.linspace(-3, 3, 61)[torch.randperm(61, generator=torch.Generator().manual_seed(5))]
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 2.5},
    "top_k": {"do_sample": True, "temperature": 1.5, "top_k": 4},
    "top_p": {"do_sample": True, "temperature": 2.0, "top_p": 0.7},
}
AXES: dict[str, Sequence[Any]] = {
    "loop": ("engine", "transformers"),
    "prompts": tuple(PROMPTS),
    "images": (False, True),
    "padding": (None, "left", "right"),
    "chunk_size": (None, 1, 3, 64),
    "kv_dtype": (None, "float16", "int8", "int4"),
    "numerics": ("fast", "batch_invariant"),
    "page_size": (16, 4),
    "kernels": ("default", "reference"),
    "choice": tuple(CHOICES),
    "seed": (None, "one", "one a prompt"),
    "repetition_penalty": (None, 1.8),
    "logits_processor": (False, True),
    "said_by": ("arguments", "the model's generation config", "generation_config"),
    "max_new_tokens": (6, 1),
    "stop": (None, "a token", "two tokens", "never", "a string", "only a string", "a criterion", "only a criterion"),
    "pad_token_id": (None, 60),
    "streamer": (False, True),
    "return_dict_in_generate": (False, True),
    "mode": ("grad", "inference_mode"),
}


def is_valid(row: Row) -> bool:
    """True unless the row says what a loop does not know (see `REFUSED`), or what there is none of."""
    several = row.get("prompts") in ("several", "single tokens")
    in_engine, in_transformers = (row.get("loop") == loop for loop in AXES["loop"])
    sampled = row.get("choice", "greedy") != "greedy"
    return not (
        (row.get("prompts") == "several" and "padding" in row and row["padding"] is None)
        or (row.get("kernels") == "reference" and row.get("numerics") == "batch_invariant")
        or (several and row.get("streamer"))
        or (in_engine and (row.get("said_by") == "generation_config" or row.get("return_dict_in_generate")))
        or (in_transformers and row.get("seed"))
        or (in_transformers and several and sampled)  # its rows draw from one generator
        or (in_engine and sampled and "seed" in row and row["seed"] is None)  # nothing is repeatable then
    )


def choose(row: Row, logits: Tensor, text: list[int], draw: Callable[..., Tensor]) -> tuple[Tensor, int]:
    """The scores [v] that the options make of logits [v] behind these text tokens, and the token that is chosen."""
    scores, options = logits.float().clone(), CHOICES[row["choice"]]
    for token in set(text) if row["repetition_penalty"] else ():
        penalty = row["repetition_penalty"]
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    if row["logits_processor"]:
        scores = scores + FAVORED
    scores = scores / options.get("temperature", 1.0)
    top_k = options.get("top_k", 50 if row["loop"] == "transformers" and "do_sample" in options else 0)  # its default
    if top_k:
        scores[scores < scores.sort().values[-top_k]] = float("-inf")
    if "top_p" in options:
        by_size = scores.argsort()
        tail = scores[by_size].softmax(0).cumsum(0) <= 1 - options["top_p"]
        scores[by_size[:-1][tail[:-1]]] = float("-inf")
    if row["choice"] == "greedy":
        return scores, int(scores.argmax())
    return scores, int(draw(scores.softmax(0)[None], 1))


def positions_of(ids: list[list[int]]) -> list[int]:
    """The numbers of positions of prompts, 9 for each image."""
    return [len(tokens) + 8 * tokens.count(-200) for tokens in ids]


def plain_answers(row: Row, ids: list[list[int]], images: list[list[Tensor]]) -> list[list[tuple[Tensor, int]]]:
    """The scores and the token of each step of `max_new_tokens`, for each prompt alone and without a stop."""
    answers = []
    for i, (tokens, own, steps) in enumerate(zip(ids, images, steps_of_batch(positions_of(ids), row["chunk_size"]))):
        seed = {"one": SEED + i, "one a prompt": SEED - i}.get(row["seed"] or "", SEED)
        of_torch = partial(torch.multinomial, generator=torch.Generator().manual_seed(seed))
        draw = sampling_oracle.multinomial(seed) if row["loop"] == "engine" else of_torch
        embeddings, text = embed_row(PARAMS, CFG, tokens, own), [token for token in tokens if token >= 0]
        answer: list[tuple[Tensor, int]] = []
        for _ in range(row["max_new_tokens"]):
            how: dict[str, Any] = {"kv_dtype": row["kv_dtype"], "numerics": row["numerics"]}
            logits = plain_pass(PARAMS, CFG, embeddings, steps=steps, **how).logits[-1]
            answer.append(choose(row, logits, text, draw))
            text, token = [*text, answer[-1][1]], [answer[-1][1]]
            embeddings = torch.cat((embeddings, embed_row(PARAMS, CFG, token)))
            steps = [*steps, Step(1, is_decode=True)]
        answers.append(answer)
    return answers


def spell(tokens: Sequence[int]) -> str:
    return "".join(list(SPELLING)[token] for token in tokens)


def stop_options(row: Row, answer: list[int]) -> tuple[dict[str, Any], set[int], str | None]:
    """Options that stop this answer in its middle, the tokens that do so, and the string."""
    middle, last, text = answer[len(answer) // 2], answer[-1], spell(answer[len(answer) // 2 :][:2])

    def criterion(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return ids[:, -1] == middle

    return {
        None: ({}, {DEFAULT_STOP}, None),
        "a token": ({"eos_token_id": middle}, {middle}, None),
        "two tokens": ({"eos_token_id": [last, middle]}, {last, middle}, None),
        "never": ({"eos_token_id": None}, set[int](), None),
        "a string": ({"stop_strings": ["~", text]}, {DEFAULT_STOP}, text),
        "only a string": ({"stop_strings": text, "eos_token_id": None}, set[int](), text),
        "a criterion": ({"stopping_criteria": [criterion]}, {DEFAULT_STOP, middle}, None),
        "only a criterion": ({"stopping_criteria": [criterion], "eos_token_id": None}, {middle}, None),
    }[row["stop"]]


class Heard(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def options_of(row: Row, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of `generate` that a row has beside prompt and stop; the rest is said by configs."""
    settings = {**CHOICES[row["choice"]], "max_new_tokens": row["max_new_tokens"]}
    settings |= {"repetition_penalty": row["repetition_penalty"]} if row["repetition_penalty"] else {}
    options: dict[str, Any] = {"loop": row["loop"], "chunk_prefilling": bool(row["chunk_size"])}
    if row["said_by"] == "generation_config":
        options["generation_config"] = GenerationConfig(**settings)
    elif row["said_by"] == "arguments":
        options |= settings
    else:
        for name, value in settings.items():
            monkeypatch.setattr(MODEL.generation_config, name, value)
    if row["seed"]:
        seeds = [SEED - i for i in range(len(PROMPTS[row["prompts"]]))]
        options["seed"] = SEED if row["seed"] == "one" else seeds
    if row["logits_processor"]:
        options["logits_processor"] = [lambda ids, scores: scores + FAVORED]
    options |= {"pad_token_id": row["pad_token_id"]} if row["pad_token_id"] else {}
    options |= {"streamer": Heard()} if row["streamer"] else {}
    if row["return_dict_in_generate"]:
        options |= {"return_dict_in_generate": True, "output_scores": True}
    return options


@pytest.mark.parametrize("row", list(pairwise_rows(AXES, is_valid=is_valid)))
def test_answers_are_those_of_the_plain_pass(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"page_size": row["page_size"], "kv_dtype": row["kv_dtype"], "attention_numerics": row["numerics"]}
    for name, value in {**config, "prefill_chunk_size": row["chunk_size"] or 2}.items():
        monkeypatch.setattr(MODEL.config, name, value)
    ids = [words(n, seed=i).tolist() for i, n in enumerate(PROMPTS[row["prompts"]])]
    if row["images"]:
        ids[0][len(ids[0]) // 2] = ids[-1][-1] = -200
    left = list(IMAGES)
    images = [[left.pop(0) for token in tokens if token == -200] for tokens in ids]
    with torch.no_grad():
        plain = plain_answers(row, ids, images)
    stop, stop_tokens, stop_string = stop_options(row, [token for _, token in plain[0]])
    expected: list[list[int]] = []
    for tokens, answer in zip(ids, plain):
        prompt = spell([token for token in tokens if token >= 0])
        expected.append([])
        for _, token in answer:
            expected[-1].append(token)
            ends = stop_string is not None and (prompt + spell(expected[-1])).endswith(stop_string)
            if token in stop_tokens or ends:
                break
    first_stop = stop.get("eos_token_id", DEFAULT_STOP)
    pad = (first_stop[0] if isinstance(first_stop, list) else first_stop) or 0
    pad = pad if row["pad_token_id"] is None else row["pad_token_id"]
    width = max(map(len, expected))

    given: dict[str, Any] = options_of(row, monkeypatch) | stop | ({"tokenizer": TOKENIZER} if stop_string else {})
    padded_ids, mask = padded(ids, row["padding"] or "left", fill=7)
    given |= {"attention_mask": mask} if row["padding"] else {}
    given |= {"images": torch.stack(list(chain(*images)))} if row["images"] else {}
    with ExitStack() as stack:
        if row["mode"] == "inference_mode":
            stack.enter_context(torch.inference_mode())
        if row["kernels"] == "reference":
            stack.enter_context(use(**dict.fromkeys(OPS, "reference")))
        calls = stack.enter_context(count_calls())
        torch.manual_seed(SEED)
        output = MODEL.generate(padded_ids, **given)
    found = output.sequences if row["return_dict_in_generate"] else output
    assert found.tolist() == [answer + [pad] * (width - len(answer)) for answer in expected]
    num_steps = -(-max(positions_of(ids)) // (row["chunk_size"] or 99)) + width - 1
    writes = sum(n for (op, _), n in calls.items() if op == "rope_kv_write")
    assert writes == CFG.llm.num_hidden_layers * num_steps
    if row["streamer"]:
        text = [token for token in ids[0] if token >= 0]
        assert given["streamer"].tokens == [*text, *expected[0]] and given["streamer"].ended
    if row["return_dict_in_generate"]:
        assert len(output.scores) == width
        for i, answer in enumerate(expected):
            for (scores, _), found_scores in zip(plain[i][: len(answer)], output.scores):
                one_rounding = torch.finfo(torch.float32).eps * scores[scores.isfinite()].abs().max()
                torch.testing.assert_close(found_scores[i], scores, rtol=0, atol=float(one_rounding))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 12))
def test_other_rows_too(seed: int) -> None:
    for row in pairwise_rows(AXES, seed, is_valid):
        with pytest.MonkeyPatch.context() as monkeypatch:
            test_answers_are_those_of_the_plain_pass(row, monkeypatch)


ENGINE, TRANSFORMERS = {"loop": "engine"}, {"loop": "transformers"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "engine, num_beams": (ENGINE | {"num_beams": 2}, "loop='engine' does not know num_beams"),
    "engine, return_dict_in_generate": (
        ENGINE | {"return_dict_in_generate": True},
        "loop='engine' does not know return_dict_in_generate",
    ),
    "engine, generation_config": (ENGINE | {"generation_config": GenerationConfig()}, "not know generation_config"),
    "engine, max_length": (ENGINE | {"max_length": 9}, "loop='engine' does not know max_length"),
    "transformers, seed": (
        TRANSFORMERS | {"seed": 1},
        "not honour seed: .* torch.manual_seed",
    ),
    "transformers, use_cache": (TRANSFORMERS | {"use_cache": False}, "'transformers' does not honour use_cache"),
    "two prompts, streamer": ({"streamer": Heard()}, "a streamer takes one prompt at a time, got 2"),
    "two prompts, seeds": ({"seed": [1, 2, 3], "do_sample": True}, "3 seeds for 2 prompts"),
}
for _loop in (ENGINE, TRANSFORMERS):
    for _name, _value in {"temperature": 0.5, "top_k": 3, "top_p": 0.5}.items():
        REFUSED[f"{_loop['loop']}, greedy, {_name}"] = (_loop | {_name: _value}, f"{_name}.* need do_sample=True")
    REFUSED |= {
        f"{_loop['loop']}, stop_strings": (_loop | {"stop_strings": "a"}, "stop_strings need tokenizer="),
        f"{_loop['loop']}, max_new_tokens": (_loop | {"max_new_tokens": 244}, "13 positions .* 244 more .* is 256"),
    }
REFUSED |= {
    f"generation_config, {name}": (TRANSFORMERS | {"generation_config": GenerationConfig(**values)}, message)
    for name, values, message in (
        ("greedy, temperature", {"temperature": 0.5}, "temperature.* need do_sample=True"),
        ("max_new_tokens", {"max_new_tokens": 244}, "13 positions .* 244 more .* is 256"),
        ("max_length", {"max_length": 13}, "13 positions, but max_length is 13"),
    )
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_options_that_exclude_each_other_are_refused_before_any_token(options: dict, message: str) -> None:
    def never(ids: Tensor, scores: Tensor) -> Tensor:
        raise AssertionError("a token was made")

    ids = torch.tensor([[1, 5, -200, 7, 8], [1, 9, 4, 6, 3]])
    given = {"images": IMAGES[:1], "logits_processor": [never], **options}
    with count_calls() as calls, pytest.raises(ValueError, match=message):
        MODEL.generate(ids, **given)
    assert not any(op in ("rope_kv_write", "prefill_attention") for op, _ in calls)


@pytest.mark.parametrize("how", [{"max_length": 17}, {"generation_config": GenerationConfig(max_length=17)}], ids=str)
def test_max_length_counts_the_positions_of_images(how: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1, 5, -200, 7, 8]])  # 13 positions
    monkeypatch.setattr(MODEL.generation_config, "max_new_tokens", 2)  # the call counts before it
    found = MODEL.generate(ids, images=IMAGES[:1], loop="transformers", eos_token_id=None, **how)
    assert torch.equal(found, MODEL.generate(ids, images=IMAGES[:1], max_new_tokens=4, eos_token_id=None))
