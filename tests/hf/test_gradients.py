"""The gradient of the loss is that of the plain pass, or asking for it is an error: never one that lacks a part."""

import copy
from typing import Any

import pytest
import torch
from hf_reference import build, padded, pictures, words
from plain_pass import embed_row, plain_pass
from torch import Tensor

from bench.correctness.error_budget import unit_roundoff
from bench.correctness.guarded_memory import map_tensors

MODEL = build(gain=2.0)
IMAGES = pictures(MODEL, 2)
ROWS = [[1, 5, -200, *words(8).tolist()], words(5, seed=3).tolist(), [7, -200, 9]]
NO_GRADIENT = "read from the KV cache have no gradient; run whole sequences in one pass, with use_cache=False"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    MODEL.cache = None
    MODEL.zero_grad()
    monkeypatch.setattr(MODEL.config, "prefill_chunk_size", 4)


def gradients(loss: Tensor) -> dict[str, Tensor]:
    MODEL.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in MODEL.named_parameters() if p.grad is not None}


def plain_gradients(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of the mean of -log p over all text tokens of ROWS but the first of each, computed in this dtype."""
    params, cfg = map_tensors(lambda x: x.to(dtype), MODEL.params), MODEL.vila_config
    images, losses = list(IMAGES.to(dtype)), list[Tensor]()
    for row in ROWS:
        embeddings = embed_row(params, cfg, row, [images.pop(0) for token in row if token == -200])
        logits = plain_pass(params, cfg, embeddings).logits
        spliced = [x for token in row for x in ([token] if token != -200 else [-200] * 9)]
        losses += [-logits[i - 1].log_softmax(0)[token] for i, token in enumerate(spliced) if i and token != -200]
    return gradients(torch.stack(losses).mean())


def given(**more: Any) -> dict[str, Any]:
    ids, mask = padded(ROWS)
    return {"input_ids": ids, "attention_mask": mask, "images": IMAGES, "labels": ids, **more}


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"start_pos": 0}, {"return_dict": False}], ids=str)
def test_gradient_of_the_loss_is_that_of_the_plain_pass(how: dict) -> None:
    """Within twice the sum of both errors, each that of float32 times the ratio of the unit roundoffs."""
    expected, rounded, found = plain_gradients(), plain_gradients(torch.float32), gradients(MODEL(**given(**how))[0])
    assert expected.keys() == found.keys() and len(found) > 40
    ratio = unit_roundoff(torch.float64) / unit_roundoff(torch.float32)
    budget = 4 * max(float((expected[name] - rounded[name]).abs().amax()) for name in expected) * ratio
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=budget)


@pytest.mark.parametrize(
    "how",
    [
        {"chunk_prefilling": True},
        {"chunk_prefilling": True, "use_cache": False},
        {"past": True},
        {"past": True, "use_cache": False},
        {"single": True},
        {"kv_dtype": "int8", "attention_numerics": "batch_invariant"},
    ],
    ids=str,
)
def test_gradient_that_would_leave_out_cached_tokens_is_refused(how: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kv_dtype", "attention_numerics"):
        if name in how:
            monkeypatch.setattr(MODEL.config, name, how[name])
    arguments = given(**{name: value for name, value in how.items() if name in ("chunk_prefilling", "use_cache")})
    if "past" in how:
        MODEL(words(3, 2), start_pos=0)
        arguments["start_pos"] = 2
    if "single" in how:
        arguments = {"input_ids": words(2, 1)}
    parameters = list(MODEL.get_submodule("llm").parameters())
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        torch.autograd.grad(MODEL(**arguments).logits.sum(), parameters, allow_unused=True)
    output = MODEL(**arguments)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        output.logits.sum().backward()


def test_gradient_of_images_that_are_cached_is_refused_where_nothing_before_attention_is_trained() -> None:
    model = copy.deepcopy(MODEL).requires_grad_(False)
    model.mm_projector.requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    first = model(torch.tensor([[1, -200, 5]]), images=IMAGES[:1])
    output = model(words(1, 3), past_key_values=first.past_key_values)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        output.logits.sum().backward()
