"""The harness goes red: `assert_faithful` finds each of these bugs within a few random cases."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from torch import Tensor

from bench.correctness.error_budget import UNSUPPORTED_DTYPES, assert_matches_reference, example_args, example_strategy
from vila_triton import ops
from vila_triton.ops import Int4
from vila_triton.ops.attention import masked_attention
from vila_triton.ops.int4_tiles import pack_tiles
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.registry import OPS, Impl

PLANTED: list = []
USUAL = {"kv": "plain", "numerics": "fast"}  # what the bugs of attention and the cache are written for


def planted(name: str, **only: Any) -> Callable[[Callable], Callable]:
    """A bug of an op, looked for in all of its domain, or only at the given sizes."""

    def keep(fn: Callable) -> Callable:
        PLANTED.append(pytest.param(name, fn, only, id=f"{name}-{fn.__name__}"))
        return fn

    return keep


@planted("int4_matmul")
def swapped_nibbles(x: Tensor, w: Int4, *terms: Tensor | None) -> Tensor:
    q = unpack_codes(w).unflatten(1, (-1, 2)).flip(-1).flatten(1)
    return ops.int4_matmul.reference(x, replace(w, qweight=pack_tiles(q)), *terms)


@planted("int4_matmul")
def code_15_read_as_14(x: Tensor, w: Int4, *terms: Tensor | None) -> Tensor:
    return ops.int4_matmul.reference(x, replace(w, qweight=pack_tiles(unpack_codes(w).clamp(max=14))), *terms)


@planted("int4_matmul")
def scale_of_the_next_group(x: Tensor, w: Int4, *terms: Tensor | None) -> Tensor:
    return ops.int4_matmul.reference(x, replace(w, scales=w.scales.roll(1, 0)), *terms)


@planted("int4_matmul")
def bias_forgotten(x: Tensor, w: Int4, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return ops.int4_matmul.reference(x, w, None, residual)


@planted("int4_matmul")
def residual_forgotten(x: Tensor, w: Int4, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return ops.int4_matmul.reference(x, w, bias)


@planted("int4_swiglu")
def gate_and_up_exchanged(x: Tensor, gate: Int4, up: Int4) -> Tensor:
    return ops.int4_swiglu.reference(x, up, gate)


@planted("int4_matmul", dtype="float16", order="sub")  # in the other order weights are off by more than such sums
def half_precision_sum(x: Tensor, w: Int4, *terms: Tensor | None) -> Tensor:
    """Rounds the running sum as often as `tl.dot` with a float16 accumulator would."""
    plain = ops.dequantize(w, x.dtype)
    out = torch.zeros(len(x), len(plain), dtype=x.dtype, device=x.device)
    for k in range(0, plain.shape[1], 16):
        out += (x[:, k : k + 16].float() @ plain[:, k : k + 16].float().T).to(x.dtype)
    return sum((term for term in terms if term is not None), out)


@planted("int4_matmul")
def one_column_of_zeros(x: Tensor, w: Int4, *terms: Tensor | None) -> Tensor:
    out = ops.int4_matmul.reference(x, w, *terms)
    out[:, -1] = 0
    return out


@planted("int4_matmul")
def last_column_unwritten(x: Tensor, w: Int4, *terms: Tensor | None) -> Tensor:
    out = torch.empty(len(x), w.shape[0], dtype=x.dtype, device=x.device)
    out[:, :-1] = ops.int4_matmul.reference(x, w, *terms)[:, :-1]
    return out


@planted("int4_matmul")
def one_element_past_the_output(x: Tensor, w: Int4, *terms: Tensor | None) -> Tensor:
    out = torch.empty(len(x), w.shape[0], dtype=x.dtype, device=x.device)
    out.as_strided((out.numel() + 1,), (1,)).zero_()
    return out.copy_(ops.int4_matmul.reference(x, w, *terms))


@planted("prefill_attention")
def sees_one_token_ahead(q, k, v, cache, batch, scale) -> Tensor:
    out = []
    for i, t in enumerate(batch.context_lens.tolist()):
        rows = slice(*batch.query_start_loc[i : i + 2].tolist())
        keys, values = (torch.cat((old, new[rows])) for old, new in zip(cache.gather(i, t), (k, v)))
        seen = torch.ones(rows.stop - rows.start, len(keys), dtype=torch.bool).tril(t + 1).to(q.device)
        out.append(masked_attention(q[rows], keys, values, scale, seen))
    return torch.cat(out)


@planted("prefill_attention")
def context_one_short(q, k, v, cache, batch, scale) -> Tensor:
    batch = replace(batch, context_lens=(batch.context_lens - 1).clamp(min=0))
    return ops.prefill_attention.reference(q, k, v, cache, batch, scale)


@planted("decode_attention")
def strides_as_if_contiguous(q, cache, lengths, scale) -> Tensor:
    _, l, g, d = cache.k_pages.shape
    k_pages = cache.k_pages.as_strided(cache.k_pages.shape, (l * g * d, g * d, d, 1))
    return ops.decode_attention.reference(q, replace(cache, k_pages=k_pages), lengths, scale)


@planted("decode_attention")
def values_unmasked(q, cache, lengths, scale) -> Tensor:
    """The weight of what lies past the length is 0, but 0 · NaN is NaN."""
    out = ops.decode_attention.reference(q, cache, lengths, scale)
    last = [cache.block_table[i, t // cache.page_size].long() for i, t in enumerate(lengths.tolist())]
    tails = [cache.v_pages[page][-1].sum() for page in last]
    return out + 0 * torch.stack(tails)[:, None, None]


@planted("decode_attention")
def sums_not_rescaled(q, cache, lengths, scale) -> Tensor:
    out = torch.zeros_like(q)
    for i, t in enumerate(lengths.tolist()):
        keys, values = (x.float() for x in cache.gather(i, t))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        acc, total, peak = 0.0, 0.0, torch.full(q.shape[1:2], float("-inf"), device=q.device)
        for j in range(0, t, 16):
            scores = torch.einsum("hd,thd->ht", q[i].float(), keys[j : j + 16]) * scale
            peak = torch.maximum(peak, scores.amax(1))
            weights = (scores - peak[:, None]).exp()
            total = total + weights.sum(1)
            acc = acc + torch.einsum("ht,thd->hd", weights, values[j : j + 16])
        out[i] = acc / total[:, None] if isinstance(total, Tensor) else 0
    return out


@planted("encoder_attention")
def scale_forgotten(q, k, v, scale) -> Tensor:
    return ops.encoder_attention.reference(q, k, v, 1.0)


@planted("kv_write")
def uncached_token_written(k, v, k_pages, v_pages, slot_mapping) -> tuple[Tensor, Tensor]:
    slots = slot_mapping % (k_pages.shape[0] * k_pages.shape[1])
    return ops.kv_write.reference(k, v, k_pages, v_pages, slots)


@planted("rms_norm")
def argument_overwritten(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = ops.rms_norm.reference(x, weight, eps)
    x.copy_(out)
    return out


@planted("rope")
def interleaved_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    paired = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return ops.rope.reference(paired, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, F, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * F + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + offs).to(tl.float32)
    up = tl.load(up_ptr + offs).to(tl.float32)
    out = (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, out, mask=tl.arange(0, BLOCK) < F if MASKED else None)


def _swiglu(gate: Tensor, up: Tensor, masked: bool) -> Tensor:
    if not gate.is_contiguous() or not up.is_contiguous():
        gate, up = (torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) for x in (gate, up))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    block = triton.next_power_of_2(gate.shape[1])
    _swiglu_kernel[(len(gate),)](gate, up, out, gate.shape[1], MASKED=masked, BLOCK=block)  # pyright: ignore
    return out


@planted("swiglu")
def masks_dropped(gate: Tensor, up: Tensor) -> Tensor:
    return _swiglu(gate, up, masked=False)


@planted("swiglu")
def masks_of_loads_dropped(gate: Tensor, up: Tensor) -> Tensor:
    if not UNSUPPORTED_DTYPES:
        pytest.skip("only interpreted kernels are watched as they read")
    return _swiglu(gate, up, masked=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a kernel that reads past a row computes with garbage
@pytest.mark.parametrize("name, fn, only", PLANTED)
def test_mutants_are_detected(name: str, fn: Callable, only: dict) -> None:
    op = OPS[name]
    impl = Impl(name, fn.__name__, fn, [{}], Path(__file__))

    @settings(max_examples=25, derandomize=True, database=None, phases=[Phase.generate])
    @given(sizes=example_strategy(op))
    def search(sizes: dict) -> None:
        usual = {name: value for name, value in USUAL.items() if name in op.domain}
        assert_matches_reference(op, impl, {}, example_args(op, **{**sizes, **usual, **only}), sizes["seed"])

    with pytest.raises(AssertionError):
        search()
