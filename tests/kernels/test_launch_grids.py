"""Launches stay within what CUDA allows, whatever the sizes: 2³¹ - 1 programs along the first axis of a grid and 65,535
along the others. Nothing is computed: tensors have no data, and launches are only looked at.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from bench.correctness.error_budget import example_args
from bench.correctness.guarded_memory import bit_pattern, tensors
from vila_triton.ops import Int4, KVPages, PagedKV, RaggedBatch, empty_kv_pages
from vila_triton.ops.int4_tiles import tiled_shape
from vila_triton.registry import OPS, Impl, Unsupported, discover
from vila_triton.registry.interpreter import uses_triton_kernels

discover()
MEMORY = 2**38  # bytes: a GPU has no more
FIRST, OTHERS = 2**31 - 1, 2**16 - 1
IMPLS = [
    pytest.param(impl, id=f"{op.name}-{impl.name}")
    for op in OPS.values()
    for impl in op.impls.values()
    if uses_triton_kernels(impl)
]


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


def whole(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int4(n: int, k: int) -> Int4:
    return Int4(whole(*tiled_shape(n, k)), half(k // 64, n), half(k // 64, n), 64, "sub")


def pages(tokens: int, g: int, d: int) -> tuple[KVPages, KVPages]:
    pool = empty_kv_pages((-(-tokens // 16), 16, g, d), torch.float16, "meta")
    return pool, pool


def product(m: int, n: int, k: int) -> Any:
    return half(m, k), int4(n, k), half(n)


def rotation(s: int, h: int, d: int) -> Any:
    return half(s, h, d), half(s, d // 2), half(s, d // 2)


def write(s: int, g: int, d: int) -> Any:
    return half(s, g, d), half(s, g, d), *pages(s, g, d), whole(s, dtype=torch.int64)


def rotate_and_write(s: int, g: int, d: int) -> Any:
    return half(s, 4 * g, d), half(s, g, d), half(s, g, d), half(s, d // 2), half(s, d // 2), *write(s, g, d)[2:]


def decode(b: int, t: int, g: int, numerics: str) -> Any:
    cache = PagedKV(*pages(b * t, g, 16), whole(b, -(-t // 16)))
    return half(b, 4 * g, 16), cache, whole(b), 0.25, numerics


def prefill(b: int, s: int, g: int) -> Any:
    cache, batch = PagedKV(*pages(16 * b, g, 16), whole(b, 1)), RaggedBatch(whole(b + 1), whole(b))
    return half(s, 4 * g, 16), half(s, g, 16), half(s, g, 16), cache, batch, 0.25, "fast", True


def encoder(b: int, s: int, h: int) -> Any:
    return *(half(b, s, h, 32) for _ in range(3)), 0.25


def prefill_backward(b: int, s: int, g: int) -> Any:
    q, k = half(s, 4 * g, 16), half(s, g, 16)
    return q, q, k, k, q, whole(s, 4 * g, dtype=torch.float32), whole(b + 1), 0.25


def encoder_backward(b: int, s: int, h: int) -> Any:
    x = half(b, s, h, 16)
    return *(x,) * 5, whole(b, s, h, dtype=torch.float32), 0.25


MANY = 2**17  # what no axis but the first has room for, as blocks of 16, 64 and 128 rows or columns below
PRODUCTS = [(2**24, 64, 64), (1, 2**27, 64), (2**17, 2**15, 128)]
HUGE: dict[str, tuple[Callable[..., Any], list[tuple]]] = {
    "rms_norm": (lambda rows, e: (half(rows, e), half(e), 1e-5), [(2**30, 64), (1, 2**16)]),
    "swiglu": (lambda s, f: (half(s, f), half(s, f)), [(2**30, 16), (1, 2**30), (MANY, 2**14)]),
    "rope": (rotation, [(2**24, 32, 64), (1, 64 * MANY, 64)]),
    "linear": (lambda m, n, k: (half(m, k), half(n, k), half(n)), PRODUCTS),
    "int4_matmul": (product, PRODUCTS),
    "int4_swiglu": (lambda m, n, k: (half(m, k), int4(n, k), int4(n, k)), PRODUCTS),
    "int4_matmul_backward": (lambda m, n, k: (half(m, n), int4(n, k)), PRODUCTS),
    "rms_norm_backward": (lambda rows, e: (half(rows, e), half(rows, e), half(e), 1e-5), [(2**29, 64), (1, 2**16)]),
    "swiglu_backward": (lambda s, f: (half(s, f),) * 3, [(2**29, 16), (1, 2**29), (MANY, 2**13)]),
    "kv_write": (write, [(2**24, 8, 64), (1, 64 * MANY, 16)]),
    "rope_kv_write": (rotate_and_write, [(2**22, 8, 64), (1, 64 * MANY, 16)]),
    "decode_attention": (
        decode,
        [
            (b, t, g, p)
            for b, t, g in [(2**20, 16, 8), (1, 2**28, 1), (1, 16, MANY)]
            for p in ("fast", "batch_invariant")
        ],
    ),
    "prefill_attention": (prefill, [(MANY, 2**20, 4), (1, 2**26, 4), (2, 64, OTHERS)]),
    "encoder_attention": (encoder, [(MANY, 256, 16), (1, 2**26, 16), (1, 256, OTHERS)]),
    "prefill_attention_backward": (prefill_backward, [(MANY, 2**20, 4), (1, 2**25, 4), (2, 64, OTHERS)]),
    "encoder_attention_backward": (encoder_backward, [(MANY, 128, 16), (1, 2**25, 16), (1, 256, OTHERS)]),
}


def grids(monkeypatch: pytest.MonkeyPatch, impl: Impl, args: Any, config: dict[str, Any]) -> list[tuple[int, ...]]:
    """The grids of the kernels a call launches; none if it is unsupported."""
    launched: list[tuple[int, ...]] = []
    with monkeypatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", lambda _, grid: lambda *__, **___: launched.append(grid))
        try:
            impl(*args, config=config)
        except Unsupported:
            return []
    return launched


@pytest.mark.parametrize("impl", IMPLS)
def test_grids_of_every_size_that_fits_a_gpu_are_within_limits(impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, every = HUGE[impl.op]
    configs = [dict(config) for config in impl.configs]
    if impl.space:
        configs += [{name: end(values) for name, values in impl.space.axes.items()} for end in (min, max)]
    for sizes in every:
        args = arguments(*sizes)
        assert sum(x.nbytes for x in tensors(args)) <= MEMORY, (impl.op, sizes)
        seen = [grid for config in configs for grid in grids(monkeypatch, impl, args, config)]
        assert seen
        for grid in seen:
            assert 0 < grid[0] <= FIRST and all(0 < n <= OTHERS for n in grid[1:]), (sizes, grid)


@pytest.mark.parametrize("name", ["encoder_attention", "encoder_attention_backward"])
def test_images_in_several_launches_equal_those_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[name]
    impl, args = op.impls["triton"], example_args(op, 0, b=5, s=20, h=2, d=32, dtype="float16")
    one = tensors(impl(*args, config=impl.configs[0]))
    monkeypatch.setattr(import_module(f"vila_triton.kernels.{name}"), "MAX_GRID_YZ", 2)
    several = tensors(impl(*args, config=impl.configs[0]))
    assert all(torch.equal(bit_pattern(x), bit_pattern(y)) for x, y in zip(several, one, strict=True))


def test_more_heads_than_a_grid_holds_are_unsupported() -> None:
    calls = {
        "encoder_attention": encoder(1, 16, MANY),
        "prefill_attention": prefill(1, 16, MANY),
        "encoder_attention_backward": encoder_backward(1, 16, MANY),
        "prefill_attention_backward": prefill_backward(1, 16, MANY),
    }
    for op, args in calls.items():
        with pytest.raises(Unsupported, match=f"{op}: 131072 (KV )?heads, a launch has room for 65535"):
            OPS[op].impls["triton"](*args)


def test_batch_invariant_splitk_of_a_full_batch_is_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 prompts of 4,097 tokens: 65,552 rows, whose parts are added up in the same launch."""
    impl = OPS["int4_matmul"].impls["splitk"]
    seen = grids(monkeypatch, impl, product(16 * 4097, 4096, 4096), dict(impl.configs[0]))
    assert len(seen) == 1 and all(n <= OTHERS for grid in seen for n in grid[1:])
