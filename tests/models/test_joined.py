"""q, k and v as one linear: where their leaves lie, what may be joined, and that one product does what three did."""

import pickle
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vila_triton import use
from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.joined import INT4_AXES, joined, leaf_groups, with_gradients
from vila_triton.models.layers import Affine, linear
from vila_triton.models.params import init_tree, leaves, tree_map
from vila_triton.models.side_by_side import lay_side_by_side, lie_side_by_side
from vila_triton.ops import Int4

ROWS = (32, 16, 16)
KINDS = {
    "plain": {},
    "with biases": {"bias": True},
    "int4": {"group": 32},
    "int4 with biases": {"group": 32, "bias": True},
}


def linears(rows: tuple[int, ...] = ROWS, k: int = 64, group: int | None = None, bias: bool = False) -> list[Affine]:
    """Apart, of numbers of their own."""
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    weights = [drawn(n, k) for n in rows]
    return [
        Affine(w if group is None else Int4.pack(w, group), drawn(n) if bias else None)
        for n, w in zip(rows, weights, strict=True)
    ]


def laid(parts: list[Affine]) -> list[Affine]:
    """The same, side by side."""
    views = [lay_side_by_side(leaves, axis) for leaves, axis in leaf_groups(*parts)]
    return [of_leaves([view[i] for view in views], part) for i, part in enumerate(parts)]


def of_leaves(leaves: list[Tensor], like: Affine) -> Affine:
    if isinstance(like.weight, Int4):
        weight, rest = replace(like.weight, **dict(zip(INT4_AXES, leaves, strict=False))), leaves[3:]
    else:
        weight, *rest = leaves
    return Affine(weight, next(iter(rest), None))


def leaves_of(p: Affine) -> list[Tensor]:
    w = p.weight
    return [*((w.qweight, w.scales, w.zeros) if isinstance(w, Int4) else (w,)), *([] if p.bias is None else [p.bias])]


@pytest.mark.parametrize("kind", KINDS)
def test_one_product_of_joined_linears_is_the_products_of_all(kind: str) -> None:
    apart = linears(**KINDS[kind])
    assert joined(*apart) is None
    parts = laid(apart)
    whole = joined(*parts)
    assert whole is not None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for found, want in zip(linear(whole, x).split(ROWS, -1), (linear(p, x) for p in apart), strict=True):
        torch.testing.assert_close(found, want)
    for old, new in zip(apart, parts, strict=True):
        assert all(map(torch.equal, leaves_of(old), leaves_of(new)))
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for p in (*parts, whole) for x in leaves_of(p)
    }
    assert sum(storages.values()) == sum(x.nbytes for p in apart for x in leaves_of(p))  # no byte twice


def test_writes_to_a_part_are_writes_to_the_whole() -> None:
    parts = laid(linears())
    whole = joined(*parts)
    assert whole is not None
    parts[1].weight.fill_(7.0)
    assert (whole.weight[32:48] == 7).all() and not (whole.weight[48:] == 7).any()


@pytest.mark.parametrize(
    "parts",
    [
        linears((24, 16, 16), group=32),
        [*linears(group=32)[:2], linears(group=64)[2]],
        [*linears(group=32)[:2], linears()[2]],
        [*linears()[:2], linears(bias=True)[2]],
        [*linears()[:2], linears(k=32)[2]],
        [*linears()[:2], Affine(linears()[2].weight.half(), None)],
        [*linears(group=32)[:2], Affine(replace(linears(group=32)[2].weight, rounding="fma"), None)],
    ],
    ids=[
        "part of a tile",
        "another group",
        "int4 and plain",
        "a bias",
        "other inputs",
        "another dtype",
        "another rounding",
    ],
)
def test_linears_that_cannot_be_one_are_not(parts: list[Affine]) -> None:
    assert leaf_groups(*parts) == [] and joined(*parts) is None


def test_another_linear_in_the_place_of_a_part_is_not_taken_for_it() -> None:
    """Also one that begins where the part did, one from elsewhere in the storage, and one in another order."""
    q, k, v = laid(linears((16, 16, 16)))
    other = linears((16, 16, 16))
    assert joined(q, k, v) is not None
    for wrong in ((q, other[1], v), (q, v, k), (k, q, v), (q, k, k), (q, v, v)):
        assert joined(*wrong) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_only_consecutive_parts_of_one_storage_lie_side_by_side(axis: int) -> None:
    whole = torch.arange(48.0).view(6, 8)
    parts = whole.split(2, axis)
    assert lie_side_by_side(parts, axis) and not lie_side_by_side(parts[::-1], axis)
    assert not lie_side_by_side(parts, 1 - axis) and not lie_side_by_side(parts[:1] + parts[2:], axis)
    assert not lie_side_by_side([x.clone() for x in parts], axis)
    assert lie_side_by_side(parts[:-1], axis) == (axis == 0)  # along columns they are no contiguous tensor
    views = lay_side_by_side([x.clone() for x in parts], axis)
    assert lie_side_by_side(views, axis) and all(map(torch.equal, views, parts))


def test_what_has_no_memory_or_differs_stays_as_it_is() -> None:
    x = torch.zeros(2, 3)
    for parts in ([x.to("meta"), x.to("meta")], [x, x.half()], [x, torch.zeros(2, 4)]):
        assert all(a is b for a, b in zip(lay_side_by_side(parts, 0), parts, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_one_product_reach_every_part(kind: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    apart = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tuple(linears(**KINDS[kind])))

    def gradients(parts: list[Affine], multiply: Any) -> list[Tensor]:
        """Of the inputs and of all leaves but those of int4, which have none."""
        trained = [x, *(leaf for p in parts for leaf in (p.weight, p.bias) if isinstance(leaf, Tensor))]
        for leaf in trained:
            leaf.requires_grad_()
        return list(torch.autograd.grad(multiply(parts).square().sum(), trained))

    def as_one(parts: list[Affine]) -> Tensor:
        whole = joined(*parts)
        assert whole is not None
        return linear(with_gradients(whole, *parts), x)

    with use(linear="reference", int4_matmul="reference"):
        found = gradients(laid(list(apart)), as_one)
        want = gradients(list(apart), lambda parts: torch.cat([linear(p, x) for p in parts], -1))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_of_a_tree_are_joined_without_another_copy() -> None:
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    cfg = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    specs = llama.param_specs(cfg, torch.float32)
    apart = init_tree(specs, torch.Generator().manual_seed(0))
    together = llama.join_leaves(apart)
    assert all(layer.qkv is None for layer in apart.layers) and all(layer.qkv is not None for layer in together.layers)
    assert all(map(torch.equal, leaves(apart), leaves(together)))
    assert together.layers[0].o.weight is apart.layers[0].o.weight


@pytest.mark.parametrize("copied", [deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("leaf", [Tensor.clone, torch.nn.Parameter])
def test_a_copy_of_a_layer_multiplies_by_its_own_leaves(leaf: Any, copied: Any) -> None:
    norm = torch.ones(64)
    q, k, v = (replace(p, weight=leaf(p.weight)) for p in laid(linears()))
    layer = copied(llama.Layer(norm, q, k, v, q, norm, q, q, q))
    with torch.no_grad():
        layer.q.weight.fill_(7.0)
    found = llama.qkv_projections(layer, norm[None])
    torch.testing.assert_close(found[0], torch.full((1, 32), 7.0 * 64))


@pytest.mark.parametrize("changed", range(3))
def test_a_part_that_is_written_to_before_the_gradient_is_an_error(changed: int) -> None:
    """As of any weight: its gradient would be one of other numbers."""
    parts = [Affine(torch.nn.Parameter(p.weight), None) for p in linears()]
    for p, view in zip(parts, laid(parts), strict=True):
        p.weight.data = view.weight  # each goes on counting its own writes
    whole = joined(*parts)
    assert whole is not None
    y = linear(with_gradients(whole, *parts), torch.ones(1, 64, requires_grad=True)).sum()
    with torch.no_grad():
        parts[changed].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        y.backward()
