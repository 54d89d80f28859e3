"""Gradients of all parameters are those of the same model made of Hugging Face's modules, whatever kernels run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_reference import Oracle, build, config, exact_norms, pictures, spread, words
from torch import Tensor, nn

from vila_triton import VilaLlamaForCausalLM, use
from vila_triton.registry import OPS, count_calls, discover

discover()
Gradients = dict[str, Tensor]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, with biases": {"llm": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}},
}
KERNELS = {
    "default": {},
    "reference": dict.fromkeys(OPS, "reference"),
    "triton": {name: "triton" for name, op in OPS.items() if "triton" in op.impls and name != "linear"},
}


@dataclass(frozen=True)
class Batch:
    """Rows of several lengths, some with images, and their labels."""

    rows: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]]

    def images(self, model: VilaLlamaForCausalLM) -> Tensor:
        return pictures(model, sum(token == -200 for row in self.rows for token in row))

    def padded(self, rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
        longest = max(map(len, rows))
        fills = [[value] * (longest - len(row)) for row in rows]
        return torch.tensor([[*row, *fill] if side == "right" else [*fill, *row] for row, fill in zip(rows, fills)])

    def arguments(self, model: VilaLlamaForCausalLM, side: str) -> dict[str, Any]:
        """The arguments of `forward` of our model."""
        return {
            "input_ids": self.padded(self.rows, 0, side),
            "attention_mask": self.padded([[1] * len(row) for row in self.rows], 0, side),
            "labels": self.padded(self.labels, 5, side),
            "images": self.images(model),
        }


_ROWS = [[1, 5, -200, *words(8).tolist()], [*words(5, seed=3).tolist(), 0, 4], [7, -200, 9, -200, 6]]
BATCH = Batch(_ROWS, [[-100, -100, 7, *_ROWS[0][3:]], *_ROWS[1:]])  # the first row begins with a prompt
SHORT = Batch([[1, -200, 5], [7, 0, 6, 9]], [[1, -200, 5], [7, -100, 6, 9]])


@cache
def model_of(variant: str, dtype: torch.dtype) -> VilaLlamaForCausalLM:
    model: Any = build(config(**VARIANTS[variant]), gain=2.0)
    return model.to(dtype).train()


def gradients(modules: dict[str, nn.Module], loss: Tensor) -> Gradients:
    """By the names of our model's parameters; those without a gradient are left out."""
    for module in modules.values():
        module.zero_grad()
    loss.backward()
    named = [(f"{part}.{name}", p) for part, module in modules.items() for name, p in module.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@cache
def their_gradients(variant: str, dtype: torch.dtype, batch_name: str, how: str = "stock") -> Gradients:
    """Of Hugging Face's modules: "stock", under "autocast", or "exact" without their detours through float32: in the
    norms and in the loss.
    """
    model, batch = model_of(variant, dtype), BATCH if batch_name == "BATCH" else SHORT
    oracle = Oracle.of(model)
    with autocast(how == "autocast"), exact_norms() if how == "exact" else nullcontext():
        loss = their_loss(oracle, model, batch, is_exact=how == "exact")
    return gradients({"llm": oracle.llm, "vision_tower": oracle.tower, "mm_projector": oracle.projector}, loss)


def their_loss(oracle: Oracle, model: VilaLlamaForCausalLM, batch: Batch, is_exact: bool) -> Tensor:
    embeds = oracle.embeds([torch.tensor(row) for row in batch.rows], batch.images(model))
    longest = max(map(len, embeds))
    given = {
        "inputs_embeds": torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x in embeds]),
        "attention_mask": batch.padded([[1] * len(x) for x in embeds], 0, "right"),
    }
    labels = batch.padded([spread(row, row_labels) for row, row_labels in zip(batch.rows, batch.labels)], -100, "right")
    if not is_exact:
        return oracle.llm(**given, labels=labels).loss
    logits = oracle.llm(**given).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def autocast(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled)


@contextmanager
def checkpointing(model: VilaLlamaForCausalLM, enabled: bool) -> Iterator[None]:
    if enabled:
        model.gradient_checkpointing_enable()
    yield
    model.gradient_checkpointing_disable()


def our_gradients(
    variant: str,
    dtype: torch.dtype,
    kernels: str,
    checkpointed: bool,
    batch: Batch = BATCH,
    side: str = "right",
    casts: bool = False,
) -> Gradients:
    model = model_of(variant, dtype)
    with use(**KERNELS[kernels]), checkpointing(model, checkpointed), autocast(casts):
        loss = model(**batch.arguments(model, side)).loss
    return gradients(dict(model.named_children()), loss)


def largest_difference(found: Gradients, expected: Gradients) -> float:
    """Of any parameter, relative to its largest gradient; or to a thousandth of the largest of all, since that of the
    keys' biases is 0 but for rounding.
    """
    assert found.keys() == expected.keys() and len(found) > 50
    largest = max(float(x.abs().max()) for x in expected.values())
    scale = {name: max(float(x.abs().max()), largest / 1000) for name, x in expected.items()}
    return max(float((found[name] - x).abs().max()) / scale[name] for name, x in expected.items())


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kernels", ["default", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_hugging_faces(variant: str, kernels: str, checkpointed: bool) -> None:
    side = "left" if checkpointed else "right"
    found = our_gradients(variant, torch.float64, kernels, checkpointed, side=side)
    assert largest_difference(found, their_gradients(variant, torch.float64, "BATCH", "exact")) < 1e-9
    assert largest_difference(found, their_gradients(variant, torch.float64, "BATCH")) < 2e-6
    found = our_gradients(variant, torch.float32, kernels, checkpointed, side=side)
    assert largest_difference(found, their_gradients(variant, torch.float32, "BATCH")) < 1e-4


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kernels", ["default", "reference"])
def test_gradients_under_autocast_are_as_near_to_float32_as_hugging_faces(kernels: str, checkpointed: bool) -> None:
    found = our_gradients("plain", torch.float32, kernels, checkpointed, casts=True)
    theirs, expected = (their_gradients("plain", torch.float32, "BATCH", how) for how in ("autocast", "stock"))
    assert {x.dtype for x in found.values()} == {torch.float32} and found.keys() == expected.keys()

    def error(gradients: Gradients) -> Tensor:
        return torch.stack([(gradients[name] - x).norm() for name, x in expected.items()]).norm()

    assert error(found) < 1.2 * error(theirs)


def check_interpreted(checkpointed: bool) -> None:
    with count_calls() as calls:
        found = our_gradients("plain", torch.float32, "triton", checkpointed, SHORT)
    assert largest_difference(found, their_gradients("plain", torch.float32, "SHORT")) < 1e-4
    with_backward = {"rms_norm", "swiglu", "prefill_attention", "encoder_attention"}
    names = {"rope", *with_backward, *(f"{name}_backward" for name in with_backward)}
    assert {name for name, impl in calls if impl == "triton"} == names & KERNELS["triton"].keys()


def test_gradients_of_interpreted_kernels_are_hugging_faces() -> None:
    check_interpreted(checkpointed=False)


@pytest.mark.slow
def test_gradients_of_interpreted_kernels_with_checkpoints_are_hugging_faces() -> None:
    check_interpreted(checkpointed=True)


def test_padding_token_has_a_gradient_where_it_is_a_token_of_the_text() -> None:
    """Hugging Face leaves the row of `pad_token_id` without one, also where the mask lets the token count."""
    model = build(config(llm={"pad_token_id": 0})).train()
    ids = torch.tensor([[1, 0, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])  # the first 0 is text, the second padding
    name = "llm.model.embed_tokens.weight"
    rows = {}
    for padding_idx in (0, None):
        llm = Oracle.of(model).llm
        assert llm.model.embed_tokens.padding_idx == 0
        llm.model.embed_tokens.padding_idx = padding_idx
        with exact_norms():
            logits = llm(ids, attention_mask=mask).logits
        rows[padding_idx] = gradients({"llm": llm}, F.cross_entropy(logits[0, :2], ids[0, 1:3]))[name]
    found = gradients({"llm": model.llm}, model(ids, attention_mask=mask, labels=ids).loss)[name]  # pyright: ignore
    torch.testing.assert_close(found, rows[None], rtol=0, atol=1e-9)
    assert found[0].abs().max() > 1e-3 and not rows[0][0].any()
    torch.testing.assert_close(found[1:], rows[0][1:], rtol=0, atol=1e-9)
