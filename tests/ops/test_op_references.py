"""References equal independent implementations, and wrong arguments are refused before anything runs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_reference import exact_norms
from hypothesis import given
from hypothesis import strategies as st
from op_arguments import flat_arguments, grouped_arguments
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from vila_triton import ops
from vila_triton.ops import Int4, dequantize
from vila_triton.registry import OPS, IntRange, count_calls

D = torch.float64
PAGE_SIZES, HEADS = st.sampled_from([1, 4, 16]), st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1)])
CHUNKS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=3)  # (cached, new) tokens


def close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def numbers(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(math.prod(shape))).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 3, 17)])
def test_rms_norm_equals_hugging_faces(shape: tuple[int, ...]) -> None:
    x, norm = numbers(*shape), LlamaRMSNorm(shape[-1], eps=1e-3).to(D)
    norm.weight.data = numbers(shape[-1])
    with exact_norms():
        close(ops.rms_norm.reference(x, norm.weight.data, 1e-3), norm(x).detach())


@pytest.mark.parametrize("shape", [(1, 2), (3, 40), (2, 3, 17)])
def test_layer_norm_equals_torchs(shape: tuple[int, ...]) -> None:
    x, norm = numbers(*shape), torch.nn.LayerNorm(shape[-1], eps=1e-3).to(D)
    norm.weight.data, norm.bias.data = numbers(shape[-1]), numbers(shape[-1] + 1)[1:]
    close(ops.layer_norm.reference(x, norm.weight.data, norm.bias.data, 1e-3), norm(x).detach())


def test_rope_equals_hugging_faces_rotate_half() -> None:
    x, theta = numbers(7, 3, 10), numbers(7, 5)
    cos, sin = (f(torch.cat((theta, theta), dim=-1))[None] for f in (torch.cos, torch.sin))
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    close(ops.rope.reference(x, theta.cos(), theta.sin()), expected[0].transpose(0, 1))


def test_swiglu_equals_silu_of_the_gate_times_up() -> None:
    gate, up = numbers(5, 9), numbers(9, 5).T
    close(ops.swiglu.reference(gate, up), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "swiglu", "rope", "encoder_attention"])
def test_half_precision_is_rounded_once_at_the_end(name: str, dtype: torch.dtype) -> None:
    """Within half a unit in the last place of what float64 gives for the same numbers."""
    x = numbers(6, 4, 8, dtype=dtype)
    row = numbers(8, dtype=dtype)
    arguments: dict[str, tuple] = {
        "rms_norm": (x, row, 1e-5),
        "layer_norm": (x, row, row, 1e-5),
        "swiglu": (x[0], x[1]),
        "rope": (x, x[:, 0, :4].float(), x[:, 1, :4].float()),
        "encoder_attention": (x[None], x[None], torch.eye(4, 8, dtype=dtype).expand(1, 6, 4, 8), 0.3),
    }
    got = OPS[name].reference(*arguments[name])
    exact = OPS[name].reference(*(a.to(D) if isinstance(a, Tensor) else a for a in arguments[name]))
    half_step = 0.501 * torch.finfo(dtype).eps * (2 if "attention" in name else 1)  # there the weights are rounded too
    assert got.dtype == dtype and ((got.to(D) - exact).abs() <= half_step * exact.abs() + 1e-6).all()


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """[s, h, d] and [t, g, d] -> [s, h, d], with torch's attention and every key/value head repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)


def paged(sequences: list[tuple[Tensor, Tensor]], size: int) -> ops.PagedKV:
    """Keys and values [t, g, d] of each sequence in pages, last page first; all that belongs to no one is NaN."""
    counts = [-(-len(k) // size) for k, _ in sequences]
    g, d = sequences[0][0].shape[1:]
    pages = torch.full((2, sum(counts) + 1, size, g, d), float("nan"), dtype=D)
    table = torch.full((len(sequences), max(1, *counts)), sum(counts), dtype=torch.int32)
    free = list(range(sum(counts)))
    for i, (k, v) in enumerate(sequences):
        for j in range(counts[i]):
            table[i, j] = page = free.pop()
            for to, x in zip(pages, (k, v)):
                to[page, : len(x[j * size : (j + 1) * size])] = x[j * size : (j + 1) * size]
    return ops.PagedKV(pages[0], pages[1], table)


@given(CHUNKS.filter(lambda chunks: any(s for _, s in chunks)), PAGE_SIZES, HEADS)
def test_prefill_attention_equals_torchs(lengths: list[tuple[int, int]], size: int, heads: tuple[int, int]) -> None:
    h, g = heads
    all_k, all_v = ([numbers(t + s, g, 8) * sign for t, s in lengths] for sign in (1, -1))
    qs = [numbers(s, h, 8) for _, s in lengths]
    cache = paged([(k[:t], v[:t]) for k, v, (t, _) in zip(all_k, all_v, lengths)], size)
    new_k, new_v = (torch.cat([x[t:] for x, (t, _) in zip(xs, lengths)]) for xs in (all_k, all_v))
    starts = torch.tensor([0, *(s for _, s in lengths)]).cumsum(0).int()
    batch = ops.RaggedBatch(starts, torch.tensor([t for t, _ in lengths]).int())
    got = ops.prefill_attention.reference(torch.cat(qs), new_k, new_v, cache, batch, 0.4)
    expected = [
        sdpa(q, k, v, 0.4, torch.tensor([[j <= t + i for j in range(t + s)] for i in range(s)]))
        for q, k, v, (t, s) in zip(qs, all_k, all_v, lengths)
        if s
    ]
    close(got, torch.cat(expected))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), PAGE_SIZES, HEADS)
def test_decode_attention_equals_torchs(lengths: list[int], size: int, heads: tuple[int, int]) -> None:
    h, g = heads
    pairs = [(numbers(t, g, 8), -numbers(t, g, 8)) for t in lengths]
    q = numbers(len(lengths), h, 8)
    got = ops.decode_attention.reference(q, paged(pairs, size), torch.tensor(lengths).int(), 0.4)
    close(got, torch.cat([sdpa(q[i : i + 1], k, v, 0.4) for i, (k, v) in enumerate(pairs)]))


def test_a_sequence_without_tokens_decodes_to_zero() -> None:
    pages = torch.full((1, 4, 1, 8), float("nan"), dtype=D)
    cache = ops.PagedKV(pages, pages, torch.zeros(1, 1).int())
    got = ops.decode_attention.reference(numbers(1, 2, 8), cache, torch.zeros(1).int(), 1.0)
    assert got.shape == (1, 2, 8) and not got.any()


def test_encoder_attention_equals_torchs() -> None:
    q, k, v = numbers(2, 7, 3, 8), numbers(2, 3, 7, 8).transpose(1, 2), numbers(7, 2, 3, 8).transpose(0, 1)
    close(ops.encoder_attention.reference(q, k, v, 0.4), torch.stack([sdpa(*x, 0.4) for x in zip(q, k, v)]))


def test_kv_write_writes_the_slots_of_its_mapping_and_no_other() -> None:
    k, v, pages = numbers(4, 2, 8), -numbers(4, 2, 8), torch.zeros(2, 3, 4, 2, 8, dtype=D)
    got = ops.kv_write.reference(k, v, *pages, torch.tensor([11, -1, 0, 5]))
    assert [x.data_ptr() for x in got] == [x.data_ptr() for x in pages]  # in place
    for written, x in zip(pages.flatten(1, 2), (k, v)):
        assert torch.equal(written[[11, 0, 5]], x[[0, 2, 3]]) and written.abs().sum() == x[[0, 2, 3]].abs().sum()


@pytest.mark.parametrize("bias", [None, numbers(5)])
def test_linear_takes_plain_and_int4_weights(bias: Tensor | None) -> None:
    w, x = Int4.pack(numbers(5, 32), 16), numbers(2, 3, 32)
    close(ops.linear.reference(x, w, bias), F.linear(x, dequantize(w, D), bias))
    close(ops.linear.reference(x, numbers(5, 32), bias), F.linear(x, numbers(5, 32), bias))


@pytest.mark.parametrize("bias", [None, numbers(5)])
def test_linear_adds_a_residual_to_plain_and_int4_products(bias: Tensor | None) -> None:
    w, x, residual = Int4.pack(numbers(5, 32), 16), numbers(2, 3, 32), numbers(5, 3, 2).permute(2, 1, 0)
    close(ops.linear.reference(x, w, bias, residual), F.linear(x, dequantize(w, D), bias) + residual)
    close(ops.linear.reference(x, numbers(5, 32), bias, residual), F.linear(x, numbers(5, 32), bias) + residual)
    close(
        ops.linear.reference(x[0, 0], numbers(5, 32), bias, residual[0, 0]),
        F.linear(x[0, 0], numbers(5, 32), bias) + residual[0, 0],
    )


def example(name: str) -> list:
    op = OPS[name]
    sizes = {
        key: max(values.low, 2) if isinstance(values, IntRange) else values.values[0]
        for key, values in op.domain.items()
    }
    return list(op.make_example(**sizes, rng=torch.Generator().manual_seed(0), device="cpu"))


TENSORS = [
    (name, argument)
    for name in ops.__all__
    if name in OPS
    for argument, x in flat_arguments(OPS[name], example(name)).items()
    if isinstance(x, Tensor)
]


@pytest.mark.parametrize("spoil", ["axes", "device"])
@pytest.mark.parametrize("name, argument", TENSORS, ids=[f"{name}-{argument}" for name, argument in TENSORS])
def test_a_tensor_of_wrong_shape_dtype_or_device_is_named(name: str, argument: str, spoil: str) -> None:
    op = OPS[name]
    values = flat_arguments(op, example(name))
    x = values[argument]
    values[argument] = x.to("meta") if spoil == "device" else torch.zeros((), dtype=x.dtype)
    is_first = argument == next(iter(values))  # the others differ from it
    named = f"{name}: .*" if spoil == "device" and is_first else f"{name}: {argument} "
    with count_calls() as calls, pytest.raises(ValueError, match=named):
        op(**grouped_arguments(op, values))
    assert not calls


def half(x: Tensor) -> Tensor:
    return x.half()


CONTRACTS: list[tuple[str, dict[str, Any], str]] = [
    ("rms_norm", {"weight": lambda w: w[1:]}, "weight has shape"),
    ("layer_norm", {"bias": lambda b: b[1:]}, "bias has shape"),
    ("swiglu", {"up": lambda x: x[:, 1:]}, r"up has shape \[2, 1\], expected \[s=2, f=2\]"),
    ("swiglu", {"up": half}, "up is torch.float16, expected torch.float32 like gate"),
    ("rope", {"cos": lambda x: x[:, 1:], "sin": lambda x: x[:, 1:]}, "head dim 4, .* hold 1 pairs"),
    ("prefill_attention", {"k": half}, "k is torch.float16, expected torch.float32 like q"),
    ("prefill_attention", {"query_start_loc": lambda x: x[1:]}, "query_start_loc has 2 entries for 2"),
    ("prefill_attention", {"q": lambda q: q[:, :1]}, "1 query heads are not a multiple of 2 key/value heads"),
    ("decode_attention", {"q": lambda q: q[:, :1]}, "1 query heads are not a multiple of 2 key/value heads"),
    ("decode_attention", {"seq_lens": lambda x: x[1:]}, "seq_lens has shape"),
    ("encoder_attention", {"v": half}, "v is torch.float16, expected torch.float32 like q"),
    ("kv_write", {"v_pages": half}, "v_pages is torch.float16"),
    ("kv_write", {"slot_mapping": lambda x: x.int()}, "slot_mapping is torch.int32, expected torch.int64"),
    ("int4_matmul", {"x": lambda x: x[:, 1:]}, r"x has 127 columns, but w is \[2, 128\]"),
    ("int4_matmul", {"w": lambda w: dequantize(w, torch.float32)}, "w is a Tensor, expected an Int4"),
    ("int4_matmul", {"w": lambda w: replace(w, qweight=w.qweight.long())}, "w.qweight is torch.int64"),
    ("int4_matmul", {"w": lambda w: replace(w, qweight=w.qweight[:, 1:])}, r"qweight has .* \[1, 2, 32, 4\]"),
    ("int4_matmul", {"w": lambda w: replace(w, qweight=w.qweight.to("meta"))}, "w.qweight is on meta"),
    ("int4_matmul", {"w": lambda w: replace(w, zeros=w.zeros[1:])}, "w.zeros has shape"),
    ("int4_matmul", {"w": lambda w: replace(w, zeros=w.zeros.int())}, "w.zeros is torch.int32, expected a floating"),
    ("int4_matmul", {"w": lambda w: replace(w, group_size=12)}, "k = 24 and group_size = 12"),
    ("int4_matmul", {"w": lambda w: replace(w, rounding="add")}, "w.rounding is 'add', expected one of sub, fma"),
    ("int4_matmul", {"bias": lambda _: torch.ones(3)}, "bias has shape"),
    ("int4_matmul", {"bias": lambda _: torch.ones(2).half()}, "bias is torch.float16, expected torch.float32 like x"),
    (
        "int4_swiglu",
        {"up": lambda w: replace(w, rounding="fma")},
        "rounding 'fma', expected .* rounding 'sub', like gate",
    ),
    ("int4_swiglu", {"up": lambda w: replace(w, scales=w.scales[:, 1:], zeros=w.zeros[:, 1:])}, r"up is \[1, 128\]"),
    ("int4_swiglu", {"gate": lambda w: replace(w, qweight=w.qweight.long())}, "gate.qweight is torch.int64"),
    ("rms_norm_backward", {"grad_out": half}, "grad_out is torch.float16, expected torch.float32 like x"),
    ("rms_norm_backward", {"grad_out": lambda x: x[None]}, r"x has shape \[2, 8\], expected \[1, 2, 8\]"),
    ("swiglu_backward", {"grad_out": half}, "grad_out is torch.float16, expected torch.float32 like gate"),
    ("encoder_attention_backward", {"lse": half}, "lse is torch.float16, expected torch.float32 for torch.float32"),
    ("encoder_attention_backward", {"out": half}, "out is torch.float16, expected torch.float32 like q"),
    ("prefill_attention_backward", {"lse": lambda x: x.double()}, "lse is torch.float64, expected torch.float32"),
    ("prefill_attention_backward", {"query_start_loc": lambda x: x[:0]}, "query_start_loc is empty"),
    ("prefill_attention_backward", {"query_start_loc": lambda x: x.long()}, "query_start_loc is torch.int64"),
    ("int4_matmul_backward", {"grad_out": lambda x: x[:, 1:]}, r"w.scales has shape \[2, 2\], expected \[G, n=1\]"),
    ("int4_matmul_backward", {"w": lambda w: dequantize(w, torch.float32)}, "w is a Tensor, expected an Int4"),
    ("linear", {"w": lambda w: Int4.pack(torch.zeros(4, 32), 16), "bias": lambda b: b[:1]}, "bias has shape"),
]


@pytest.mark.parametrize("name, changes, message", CONTRACTS)
def test_arguments_that_break_a_precondition_are_refused(name: str, changes: dict, message: str) -> None:
    op = OPS[name]
    values = {key: changes.get(key, lambda x: x)(x) for key, x in flat_arguments(op, example(name)).items()}
    with count_calls() as calls, pytest.raises(ValueError, match=message):
        op(**grouped_arguments(op, values))
    assert not calls
