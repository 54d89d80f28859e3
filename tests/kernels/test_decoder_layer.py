"""A decoder layer of VILA1.5-3b's widths, int4 and random, is the same layer whatever runs its products.

At this shape an interpreted Triton kernel takes minutes. Those multiply a narrow slice instead: 16 rows of a weight,
with all of their 2,560 columns.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.correctness.error_budget import DEVICE, INTERPRETED, check_within_budget, error_budget
from vila_triton import ops
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.engine import engine
from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import Affine
from vila_triton.models.params import tree_map
from vila_triton.ops import Int4
from vila_triton.ops.int4_tiles import TILE_N, tiled_shape
from vila_triton.registry import OPS, REFERENCE, Impl, Unsupported, count_calls, discover, use
from vila_triton.registry.interpreter import uses_triton_kernels

discover()
DTYPE = torch.float16
GROUP = 128
CFG = LlamaConfig(
    vocab_size=1,
    hidden_size=2560,
    intermediate_size=6912,
    num_hidden_layers=1,
    num_attention_heads=20,
    num_key_value_heads=5,  # grouped queries, which VILA1.5-3b has none of
    head_dim=128,
)
ROWS = (1, 5)
HISTORY = 20  # tokens cached before
INT4 = [impl for name in ("int4_matmul", "int4_swiglu") for impl in OPS[name].impls.values()]


def int4(n: int, k: int, rng: torch.Generator) -> Int4:
    """A random weight that keeps about the size of what it multiplies."""
    qweight = torch.randint(-(2**31), 2**31, tiled_shape(n, k), generator=rng, dtype=torch.int32)
    scales = (torch.rand(k // GROUP, n, generator=rng) + 0.5) / (5 * k**0.5)
    zeros = torch.randint(6, 10, scales.shape, generator=rng).float()
    return Int4(qweight.to(DEVICE), scales.to(DEVICE, DTYPE), zeros.to(DEVICE, DTYPE), GROUP)


@cache
def layer() -> llama.Layer:
    rng = torch.Generator().manual_seed(0)
    e, f = CFG.hidden_size, CFG.intermediate_size
    g = CFG.num_key_value_heads * CFG.head_dim
    q, k, v, o, gate, up, down = (
        Affine(int4(*shape, rng), None) for shape in ((e, e), (g, e), (g, e), (e, e), (f, e), (f, e), (e, f))
    )
    norms = (1 + torch.randn(2, e, generator=rng) / 8).to(DEVICE, DTYPE)
    return llama.Layer(norms[0], q, k, v, o, norms[1], gate, up, down)


@torch.inference_mode()
def decoded(p: llama.Layer, rows: int, dtype: torch.dtype) -> Tensor:
    """One token of each of so many sequences, after the same history -> [rows, e]. More rows begin with the fewer's."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(max(ROWS), CFG.hidden_size, generator=rng)[:rows].to(DEVICE, dtype)
    past = PagedKVCache(CFG, 2 * max(ROWS), dtype=dtype, device=DEVICE)
    for pages in ops.page_tensors(past.k_pages) + ops.page_tensors(past.v_pages):
        pages.copy_(torch.randn(pages.shape, generator=rng))
    sequences = [past.allocator.add_sequence() for _ in range(max(ROWS))]
    with past.append_step(dict.fromkeys(sequences, HISTORY)):
        pass
    with past.append_step(dict.fromkeys(sequences[:rows], 1)) as step:
        rotary = llama.rotary_cos_sin(step.positions, CFG)
        x = x + llama.attention(p, ops.rms_norm(x, p.attention_norm, CFG.rms_norm_eps), rotary, 0, CFG, step)
        return x + llama.mlp(p, ops.rms_norm(x, p.mlp_norm, CFG.rms_norm_eps))


@cache
def exact() -> Tensor:
    wide: Any = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, layer())
    with use(**dict.fromkeys(OPS, REFERENCE)):
        return decoded(wide, max(ROWS), torch.float64)


@cache
def by_references() -> Tensor:
    with use(**dict.fromkeys(OPS, REFERENCE)):
        return decoded(layer(), max(ROWS), DTYPE)


def off(x: Tensor) -> float:
    """Return the root mean square of the distance from the exact layer."""
    return (x.double() - exact()[: len(x)]).square().mean().sqrt().item()


QUICK = [i for i in INT4 if i.name != REFERENCE and not (INTERPRETED and uses_triton_kernels(i))]


@pytest.mark.on_gpu
@pytest.mark.parametrize("impl", QUICK, ids=lambda impl: f"{impl.op}-{impl.name}")
def test_a_layer_is_the_same_by_every_implementation(impl: Impl) -> None:
    """At most twice as far from the exact one as by the references, as in `bench.model`."""
    chosen = {"int4_matmul": "blocked", "int4_swiglu": "unfused", impl.op: impl.name}
    for rows in ROWS:
        with engine.use_default_kernels(torch.device(DEVICE), "decode"), use(**chosen), count_calls() as calls:
            try:
                got = decoded(layer(), rows, DTYPE)
            except Unsupported as reason:
                pytest.skip(str(reason))
        assert {name for op, name in calls if op == impl.op} == {impl.name}
        assert off(got) <= 2 * off(by_references())


def slice_of(w: Int4) -> Int4:
    return Int4(w.qweight[:1], w.scales[:, :TILE_N], w.zeros[:, :TILE_N], w.group_size)


@cache
def call(op: str, rows: int) -> tuple[tuple, list[Tensor], list[Tensor]]:
    """A call with rows of the layer's weights, what it gives exactly, and its budget."""
    weights = [slice_of(a.weight) for a in ((layer().o,) if op == "int4_matmul" else (layer().gate, layer().up))]
    x = torch.randn(rows, CFG.hidden_size, generator=torch.Generator().manual_seed(2)).to(DEVICE, DTYPE)
    return (x, *weights), *error_budget(OPS[op], (x, *weights))


KERNELS = [impl for impl in INT4 if uses_triton_kernels(impl)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("impl", KERNELS, ids=lambda impl: f"{impl.op}-{impl.name}")
def test_a_slice_is_the_same_by_every_triton_kernel(impl: Impl, rows: int) -> None:
    args, (want,), (allowed,) = call(impl.op, rows)
    try:
        got = impl(*args, config=impl.configs[0])
    except Unsupported as reason:
        pytest.skip(str(reason))
    check_within_budget(0, got, want, allowed)
