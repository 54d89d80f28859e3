"""The parameters of q, k and v are views of one storage, and are so again whenever something has moved them."""

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import build, words
from torch import Tensor, nn

from vila_triton import VilaLlamaForCausalLM
from vila_triton.models.layers import Affine, linear
from vila_triton.models.llama import qkv_projections
from vila_triton.models.params import leaves

TINY = Path(__file__).parents[2] / "vila_triton" / "tiny"
FOLDERS = {"dense": TINY / "checkpoint", "int4": TINY / "checkpoint-int4"}
each_kind = pytest.mark.parametrize("kind", FOLDERS)


def load(kind: str, **options: Any) -> VilaLlamaForCausalLM:
    return VilaLlamaForCausalLM.from_pretrained(FOLDERS[kind], device="cpu", **options)


def assert_joined(model: VilaLlamaForCausalLM) -> None:
    """In every layer, and no byte of the language model is held twice."""
    assert all(layer.qkv is not None for layer in model.params.llm.layers)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves(model.params.llm)}
    assert sum(storages.values()) == sum(x.nbytes for x in leaves(model.params.llm))


def replaced(model: VilaLlamaForCausalLM) -> VilaLlamaForCausalLM:
    model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    return model


def saved(model: VilaLlamaForCausalLM) -> VilaLlamaForCausalLM:
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    assert len(stream.getvalue()) < 1.02 * sum(x.nbytes for x in model.parameters())
    stream.seek(0)
    model.load_state_dict(torch.load(stream))
    return model


MOVES: dict[str, Callable[[VilaLlamaForCausalLM], VilaLlamaForCausalLM]] = {
    "loaded": lambda model: model,
    "to another dtype": lambda model: model.to(torch.bfloat16),  # pyright: ignore
    "half": lambda model: model.half(),
    "a copy": deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "other parameters": replaced,
    "torch.save": saved,
    "memory that is given later": lambda model: model.to("meta").to_empty(device="cpu"),  # pyright: ignore
}


@each_kind
@pytest.mark.parametrize("move", MOVES)
def test_parameters_are_joined_wherever_they_are_moved(kind: str, move: str) -> None:
    model = load(kind, dtype=torch.float32)
    numbers = {name: x.clone() for name, x in model.state_dict().items()}
    moved = MOVES[move](model)
    assert_joined(moved)
    assert list(moved.state_dict()) == list(numbers)
    if move != "memory that is given later":
        assert all(torch.equal(x, numbers[name].to(x.dtype)) for name, x in moved.state_dict().items())


@each_kind
def test_saved_model_has_three_tensors_and_loads_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    model = load(kind)
    model.save_pretrained(tmp_path / "saved")
    again = VilaLlamaForCausalLM.from_pretrained(tmp_path / "saved", device="cpu")
    assert_joined(again)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@torch.no_grad()
@each_kind
def test_tree_is_made_anew_only_after_a_change(kind: str) -> None:
    model = load(kind, dtype=torch.float32)
    q = model.llm.get_submodule("model.layers.0.self_attn.q_proj")  # pyright: ignore
    name = "weight" if kind == "dense" else "scales"
    before = model.params.llm
    assert model.params.llm is before
    want = model(words(1, 5)).logits
    getattr(q, name).mul_(2)
    assert model.params.llm is not before
    twice = model(words(1, 5)).logits
    assert not torch.equal(twice, want)
    setattr(q, name, nn.Parameter(getattr(q, name) / 2))  # no view: three products, until it is moved
    assert model.params.llm.layers[0].qkv is None and model.params.llm.layers[1].qkv is not None
    torch.testing.assert_close(model(words(1, 5)).logits, want)
    assert_joined(model.double().float())
    torch.testing.assert_close(model(words(1, 5)).logits, want)


@torch.no_grad()
@each_kind
def test_one_product_gives_the_queries_keys_and_values_of_three(kind: str) -> None:
    layer = load(kind, dtype=torch.float32).params.llm.layers[0]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    found = qkv_projections(layer, x)
    for a, b in zip(found, (linear(p, x) for p in (layer.q, layer.k, layer.v)), strict=True):
        torch.testing.assert_close(a, b)
    doubled = replace(layer, q=Affine(layer.k.weight, None))  # another linear hangs there: three products
    assert doubled.qkv is None and torch.equal(qkv_projections(doubled, x)[0], linear(layer.k, x))


def test_model_trains_as_one_whose_parameters_lie_apart() -> None:
    def trained(model: VilaLlamaForCausalLM) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.llm.parameters(), lr=0.1)  # pyright: ignore
        for _ in range(2):
            optimizer.zero_grad()
            model(words(2, 6), labels=words(2, 6)).loss.backward()
            optimizer.step()
        return [x.detach() for x in model.llm.parameters()]  # pyright: ignore

    together, apart = build(dtype=torch.float32), build(dtype=torch.float32)
    for layer in apart.params.llm.layers:
        layer.q.weight.data = layer.q.weight.data.clone()
    assert_joined(together)
    assert all(layer.qkv is None for layer in apart.params.llm.layers)
    for a, b in zip(trained(together), trained(apart), strict=True):
        torch.testing.assert_close(a, b)
