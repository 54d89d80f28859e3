"""Low-rank terms of a linear map: it computes with them what it does with their sum merged into its weight."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import Affine, LowRank, linear
from vila_triton.models.params import init_tree, leaves, tree_map
from vila_triton.ops.int4_weight import dequantize
from vila_triton.registry import count_calls

NAMES = "q", "k", "v", "o", "gate", "up", "down"
CFG = LlamaConfig(
    vocab_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def terms(n: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[LowRank, ...]:
    return tuple(LowRank(drawn(r, k, seed=r, dtype=dtype), drawn(n, r, seed=n, dtype=dtype), 0.5 / r) for r in (1, 4))


def merged(p: Affine) -> Affine:
    weight = p.weight if isinstance(p.weight, Tensor) else dequantize(p.weight, torch.float64)
    return Affine(weight + sum(term.scaling * term.b @ term.a for term in p.low_rank), p.bias)


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
def test_layer_with_terms_is_the_layer_of_the_merged_weights(int4: bool, joined: bool) -> None:
    p = init_tree(llama.param_specs(CFG, torch.float64), torch.Generator().manual_seed(0))
    p = llama.quantize_linears_rtn(p, 32) if int4 else p
    layer = (llama.join_leaves(p) if joined else p).layers[0]
    assert (layer.qkv is not None) == joined
    with_terms = replace(layer, **{n: replace(w := getattr(layer, n), low_rank=terms(*w.weight.shape)) for n in NAMES})
    dense = replace(with_terms, **{name: merged(getattr(with_terms, name)) for name in NAMES})
    x, residual = drawn(5, 64), drawn(5, 64, seed=1)
    for a, b in zip(llama.qkv_projections(with_terms, x), llama.qkv_projections(dense, x), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(linear(with_terms.o, x, residual), linear(dense.o, x, residual))
    torch.testing.assert_close(llama.mlp(with_terms, x, residual), llama.mlp(dense, x, residual))


def test_terms_keep_their_dtype_and_results_that_of_the_weight() -> None:
    """As peft has them: adapters of a model in bfloat16 are trained in float32."""
    p = Affine(drawn(48, 64, dtype=torch.bfloat16), None, terms(48, 64, torch.float32))
    x, residual = drawn(3, 64, dtype=torch.bfloat16), drawn(3, 48, dtype=torch.bfloat16)
    out = linear(p, x, residual)
    want = x.float() @ (p.weight.float() + sum(term.scaling * term.b @ term.a for term in p.low_rank)).T + residual
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, rtol=2**-7, atol=2**-5)


def test_dropout_leaves_out_inputs_of_a_term_and_not_of_the_weight() -> None:
    eye = torch.eye(64)
    p = Affine(torch.zeros(64, 64), None, (LowRank(eye, eye, scaling=2.0, dropout=0.25),))
    torch.manual_seed(0)
    out = linear(p, torch.ones(64, 64))
    assert out.unique().tolist() == [0.0, pytest.approx(2 / 0.75)] and 0.7 < out.count_nonzero() / 64**2 < 0.8
    kept = linear(replace(p, weight=eye), eye).diagonal()
    assert kept.unique().tolist() == [1.0, pytest.approx(1 + 2 / 0.75)]


def test_terms_are_leaves_of_the_tree() -> None:
    p = Affine(drawn(4, 8), None, terms(4, 8))
    assert [x.shape for x in leaves(p)] == [(4, 8), (1, 8), (4, 1), (4, 8), (4, 4)]
    doubled = tree_map(lambda x: 2 * x, p)
    assert doubled.low_rank[1].scaling == 0.125 and torch.equal(doubled.low_rank[1].a, 2 * p.low_rank[1].a)


def test_int4_products_of_the_mlp_are_not_computed_again_in_the_backward_pass() -> None:
    p = init_tree(llama.param_specs(CFG, torch.float64), torch.Generator().manual_seed(0))
    layer, x = llama.quantize_linears_rtn(p, 32).layers[0], drawn(5, 64)
    with count_calls() as calls:
        want = llama.mlp_hidden(layer, x)
    assert [op for op, _ in calls if op.startswith("int4_swiglu")] == ["int4_swiglu"]
    with count_calls() as calls:
        out = llama.mlp_hidden(layer, x.requires_grad_())
        out.sum().backward()
    ran = Counter(op for op, _ in calls.elements())
    assert (ran["int4_swiglu"], ran["int4_matmul"], ran["int4_matmul_backward"]) == (0, 2, 2)
    torch.testing.assert_close(out, want)
