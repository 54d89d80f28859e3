"""Ops that move or quantize numbers treat special values bit for bit alike: NaN, infinities, zeros, extremes.

Compiled, the products of a rotation are not rounded before they are added, so that other numbers of `rope` may differ.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.correctness.error_budget import DEVICE, INTERPRETED, UNSUPPORTED_DTYPES, example_args
from bench.correctness.guarded_memory import (
    MEMORY_LAYOUTS,
    MemoryLayout,
    bit_pattern,
    guard_tensor,
    map_tensors,
    tensors,
)
from vila_triton.ops import KVPages
from vila_triton.registry import OPS, Impl, OneOf, Op, discover

discover()
MOVING = [OPS["rope"], *(op for op in OPS.values() if op.bitwise_exact)]
KINDS = [(op, kv) for op in MOVING for kv in getattr(op.domain.get("kv"), "values", [None])]
CASES = [
    pytest.param(op, kv, impl, id=f"{op.name}-{kv}-{impl.name}")
    for op, kv in KINDS
    for impl in op.impls.values()
    if impl.name != "reference"
]


def special(dtype: torch.dtype) -> Tensor:
    """NaN, both infinities, both zeros, and both ends of the normal and of the subnormal numbers."""
    info = torch.finfo(dtype)
    ends = [info.max, info.tiny, info.smallest_normal * info.eps, info.tiny * (1 - info.eps), 1.0, 0.0, torch.inf]
    return torch.tensor([torch.nan, *ends, *(-x for x in ends)], dtype=dtype, device=DEVICE)


def planted(x: Tensor, rng: torch.Generator) -> Tensor:
    """New tokens x [s, h, d], some of whose heads hold one special value or are full of it, or of several."""
    values = special(x.dtype)
    drawn = values[torch.randint(len(values), x.shape, generator=rng).to(DEVICE)]
    share = torch.tensor([0.0, 1.5 / x.shape[-1], 1.0])[torch.randint(3, x.shape[:2], generator=rng)]
    chosen = (torch.rand(x.shape, generator=rng) < share[..., None]).to(DEVICE)
    one = torch.rand(x.shape[:2], generator=rng) < 0.5  # the same value in all of the head
    return torch.where(chosen, torch.where(one[..., None].to(DEVICE), drawn[..., :1], drawn), x)


def canonical(x: Tensor) -> Tensor:
    """The bits, but for those of a NaN, which arithmetic does not define."""
    return bit_pattern(torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x)


def change_page_dtype(pages: KVPages, dtype: torch.dtype) -> KVPages:
    """Plain pages in a dtype, or quantized ones with scales in it."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, pages)


@pytest.mark.on_gpu
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of interpreted kernels
@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
@pytest.mark.parametrize("dtype", [x for x in ("float32", "float16", "bfloat16") if x not in UNSUPPORTED_DTYPES])
@pytest.mark.parametrize("op, kv, impl", CASES)
def test_special_values_are_moved_and_quantized_to_the_same_bits(
    op: Op, kv: str | None, impl: Impl, dtype: str, layout: MemoryLayout
) -> None:
    """Aligned arguments meet the first config, and pages in another dtype, which may hold fewer numbers; strided ones
    the last config, and pages in the dtype of the new tokens.
    """
    usual = {n: d.values[0] if isinstance(d, OneOf) else min(d.high, 2) for n, d in op.domain.items()}
    sizes: dict[str, Any] = usual | ({"kv": kv} if kv else {}) | {"dtype": dtype, "s": 8}
    rng = torch.Generator().manual_seed(0)
    args = example_args(op, 0, **sizes)
    args = tuple(planted(x, rng) if isinstance(x, Tensor) and x.dim() == 3 else x for x in args)
    if kv:
        page_dtype = torch.float16 if (dtype == "float32") == (layout == "aligned") else torch.float32
        args = (*args[:-3], *(change_page_dtype(pages, page_dtype) for pages in args[-3:-1]), args[-1])
    config = impl.configs[0 if layout == "aligned" else -1]
    actual_args = map_tensors(lambda x: guard_tensor(x, rng, layout).view, args)
    expected_args = map_tensors(torch.clone, args)
    actual, expected = tensors(impl(*actual_args, config=config)), tensors(op.reference(*expected_args))
    for x, y in zip([*actual, *tensors(actual_args)], [*expected, *tensors(expected_args)], strict=True):
        same = canonical(x) == canonical(y)
        if not op.bitwise_exact and not INTERPRETED:
            same |= x.isfinite() & y.isfinite() & (x != 0) & (y != 0)
        assert x.dtype == y.dtype and x.shape == y.shape and same.all()
