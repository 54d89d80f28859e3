"""Bugs that were reported of other projects' kernels: each report is a test here, and named in its docstring."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from far_memory import FarMemory
from triton.runtime.interpreter import InterpreterBuilder

from bench import inspect
from bench.correctness.error_budget import DEVICE, assert_matches_reference, example_args
from bench.correctness.guarded_memory import guarded_allocations
from vila_triton.kernels import _int4_dequant  # pyright: ignore
from vila_triton.ops import Int4, int4_matmul, int4_swiglu
from vila_triton.registry import REFERENCE, Impl, Op, discover
from vila_triton.registry.kernel_config import configured_choices

discover()
Config = Mapping[str, Any]
LIBRARY = (REFERENCE, "aten", "bags", "blocked", "unfused", "rowwise")  # no kernels of ours
OURS: list[tuple[Op, Impl, Config]] = [
    (op, impl, config)
    for op in (int4_matmul, int4_swiglu)
    for impl in op.impls.values()
    if impl.name not in LIBRARY
    for config in impl.configs
]


def each(cases: list[tuple[Op, Impl, Config]]) -> pytest.MarkDecorator:
    ids = [f"{op.name}-{impl.name}-{list(impl.configs).index(config)}" for op, impl, config in cases]
    return pytest.mark.parametrize("op, impl, config", cases, ids=ids)


EACH_CONFIG, EACH_KERNEL = each(OURS), each([case for case in OURS if case[2] is case[1].configs[0]])
IMPLS = int4_matmul.impls
EACH_SPLIT = pytest.mark.parametrize("name", ["gemv", "splitk"])
SERVED = pytest.mark.parametrize("name", [name for name in IMPLS if name != REFERENCE])
word_pointers = _int4_dequant.word_pointers


def drawn(op: Op, **sizes: Any) -> tuple[Any, ...]:
    usual = {"m": 2, "n": 17, "G": 2, "group": 64, "dtype": "float16", "order": "sub", "seed": 0}
    return example_args(op, **{**usual, **({"bias": False} if op is int4_matmul else {}), **sizes})


@pytest.mark.on_gpu
@EACH_CONFIG
@pytest.mark.parametrize("strides", [(2**30 + 1, 1), (1, 2**31 // 127 + 1)], ids=["rows", "columns"])
def test_x_with_offsets_beyond_32_bits(
    op: Op,
    impl: Impl,
    config: Config,
    strides: tuple,
    far: FarMemory,
) -> None:
    """sgl-project/sglang#20389: a row's number times a stride, in 32 bits; here also a column's."""
    x, *weights = drawn(op, m=3, n=16)
    there = far.spread(x, strides)
    assert torch.equal(impl(there, *weights, config=config), impl(x, *weights, config=config))


@EACH_KERNEL
def test_result_with_offsets_beyond_32_bits(op: Op, impl: Impl, config: Config, far: FarMemory) -> None:
    """sgl-project/sglang#20389, where a kernel writes."""
    if impl.name == "dequant":
        pytest.skip("a library writes the result")
    args, config = drawn(op, m=3, n=16), {**config, **({"SPLIT_K": 1} if "SPLIT_K" in config else {})}
    want = impl(*args, config=config)
    place = far.spread(torch.zeros_like(want), (2**30 + 1, 1))
    with patch.object(torch, "empty", lambda *shape, **_: place):
        assert torch.equal(impl(*args, config=config), want)


@triton.jit
def _word_offsets_kernel(tiles_ptr, out_ptr, N, K, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    at = word_pointers(tl.zeros([BLOCK], tl.int64), tl.load(tiles_ptr + offs), 3, 31, 2, N, K)
    tl.store(out_ptr + offs, at)


@pytest.mark.on_gpu
def test_weight_words_with_offsets_beyond_32_bits() -> None:
    """vllm-project/vllm#47671: the number of a page, here of a tile, times its stride, in 32 bits."""
    n, k = 2**20, 2**16
    tiles = torch.tensor([0, 1, 2**15, n // 16 - 1], device=DEVICE)
    found = torch.empty_like(tiles)
    _word_offsets_kernel[(1,)](tiles, found, n, k, BLOCK=4)  # pyright: ignore
    assert found.tolist() == [(tile * k // 64 + 3) * 128 + 31 * 4 + 2 for tile in tiles.tolist()]


@EACH_KERNEL
def test_x_that_is_a_view_of_a_larger_tensor(op: Op, impl: Impl, config: Config) -> None:
    """thu-ml/SageAttention#386: parts of one fused tensor, and turned ones, read as if they were contiguous."""
    x, *weights = drawn(op, m=3)
    want = impl(x, *weights, config=config)
    part, turned = torch.cat((x - 1, x, x + 1), 1)[:, 128:256], x.t().contiguous().t()
    for view in (part, turned, part.unflatten(0, (3, 1)), x[:1].expand(3, -1)):
        found = impl(view, *weights, config=config)
        assert found.shape == (*view.shape[:-1], 17)
        if impl.name != "dequant":  # a library sums in another order where the strides are others
            assert torch.equal(found.view(3, 17), want[:1].expand(3, -1) if view.stride(0) == 0 else want)


@EACH_CONFIG
@pytest.mark.parametrize("G, group", [(5, 32), (3, 64)])
def test_block_k_longer_than_a_group(op: Op, impl: Impl, config: Config, G: int, group: int) -> None:
    """vllm-project/vllm#39705: the scale of its first group was taken for all of a block. Here no two are alike."""
    x, *weights = drawn(op, G=G, group=group)
    factors = 2.0 ** (3 * torch.arange(G, device=DEVICE)[:, None] % 5)
    unlike = [w and replace(w, scales=w.scales * factors) for w in weights]
    assert_matches_reference(op, impl, config, (x, *unlike))


@pytest.mark.on_gpu
@EACH_CONFIG
def test_weights_of_partial_tiles_are_not_read_beyond(op: Op, impl: Impl, config: Config) -> None:
    """vllm-project/vllm#52576: packed words past the end, by a tile that spans groups. Guarded memory sees loads."""
    for sizes in ({"n": 1, "G": 3, "group": 32}, {"n": 35, "G": 1, "group": 72}):
        assert_matches_reference(op, impl, config, drawn(op, **sizes))


@pytest.mark.parametrize("op", [int4_matmul, int4_swiglu], ids=lambda op: op.name)
def test_zeros_of_another_shape_are_refused(op: Op) -> None:
    """vllm-project/vllm#47159: zeros of the wrong shape, packed or turned, were taken and read."""
    x, *weights = drawn(op, n=16)
    name = "w" if op is int4_matmul else "up"
    at, w = next((i, w) for i, w in reversed([*enumerate(weights)]) if w)
    for zeros in (w.zeros.t(), w.zeros[:, ::8].int(), w.zeros[0], w.zeros[:1], w.zeros[:, :15]):
        wrong = [replace(w, zeros=zeros) if i == at else y for i, y in enumerate(weights)]
        with pytest.raises(ValueError, match=rf"{name}\.zeros has shape .*, expected \[G=2, n=16\]"):
            op(x, *wrong)


@pytest.mark.on_gpu
@EACH_SPLIT
def test_splitk_partial_sums_are_float32(name: str) -> None:
    """vllm-project/vllm#6795: parts of a split k were added in half precision. These are whole numbers that need more
    digits than it has, and nearly cancel."""
    x, w, *_ = drawn(int4_matmul, G=8, group=128)
    sign = torch.where(torch.arange(1024) < 512, 1, -1).to(DEVICE)
    w = replace(w, scales=torch.ones_like(w.scales), zeros=torch.zeros_like(w.zeros))
    x = ((x * 4).round().abs() * sign).to(x.dtype)
    for count in (2, 4):
        assert_matches_reference(int4_matmul, IMPLS[name], {**IMPLS[name].configs[0], "SPLIT_K": count}, (x, w, None))


@EACH_SPLIT
def test_last_split_of_whole_blocks_may_be_shorter(name: str) -> None:
    """No step of it is masked, so none may lie beyond k."""
    impl = IMPLS[name]
    config = {**impl.configs[0], "SPLIT_K": 2}
    groups = 3 * config["BLOCK_K"] // 64
    args = example_args(int4_matmul, 0, m=1, n=16, G=groups, group=64, dtype="float16", order="sub", bias=False)
    assert_matches_reference(int4_matmul, impl, config, args)


@EACH_SPLIT
def test_splitk_partial_sums_are_added_in_order(name: str) -> None:
    """sgl-project/sglang#39455: atomic additions, whose order is another each time, where equal results were promised.
    There are none of numbers: parts lie side by side until all are there, which programs count."""
    args = drawn(int4_matmul, G=8, group=128, dtype="float32")
    config = {**IMPLS[name].configs[0], "SPLIT_K": 4}
    add, added = InterpreterBuilder.create_atomic_rmw, []

    def count(self: InterpreterBuilder, op: Any, ptr: Any, val: Any, *rest: Any) -> Any:
        added.append(val.data.dtype)
        return add(self, op, ptr, val, *rest)

    with patch.object(InterpreterBuilder, "create_atomic_rmw", count), guarded_allocations():
        runs = [IMPLS[name](*args, config=config) for _ in range(3)]
    assert added and set(added) == {np.dtype("int32")}
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.on_gpu
@EACH_KERNEL
@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, of that exponential
def test_sums_beyond_float16_with_results_within(op: Op, impl: Impl, config: Config) -> None:
    """vllm-project/vllm#33972: sums beyond 65504 became infinite, before a scale or the rest of the sum made them small
    again. A gate is besides so far below 0 that its exponential is infinite."""
    x, w, up, *_ = drawn(op, G=8)
    x, w = 1000 + x.abs(), replace(w, zeros=torch.zeros_like(w.zeros))
    nearly = x * torch.where(torch.arange(512) < 260, 1, -1).to(DEVICE)
    small = replace(w, scales=w.scales / 512)
    calls = (nearly, w, None), (x, small, None)
    if op is int4_swiglu:
        up = replace(up, scales=up.scales / 512)
        calls = (nearly, small, up), (x, replace(small, zeros=w.zeros + 15), up)
    for args in calls:
        assert_matches_reference(op, impl, config, args)


@SERVED
@pytest.mark.parametrize("k", [10944, 8256])
def test_k_of_real_models_that_groups_of_128_do_not_divide(name: str, k: int) -> None:
    """vllm-project/vllm#9913, vllm-project/vllm#13119, vllm-project/llm-compressor#1489: no kernel for such a layer, or
    a slow one in its place. Every variant serves them, in the groups there are."""
    args = drawn(int4_matmul, m=1, n=16, G=k // 64)
    assert_matches_reference(int4_matmul, IMPLS[name], IMPLS[name].configs[0], args)
    with pytest.raises(ValueError, match=f"k = {k} and group_size = 128, but .* group_size divide k"):
        Int4.pack(torch.zeros(1, k), 128)


@SERVED
def test_mlp_sizes_that_groups_do_not_divide(name: str) -> None:
    """vllm-project/llm-compressor#57, QwenLM/Qwen3-VL#230, vllm-project/vllm#13640: feed-forward layers of odd widths.
    Rows may be any number; columns a multiple of 8, then in one group."""
    if name == "aten":
        pytest.skip("torch's groups are powers of two")
    for sizes in ({"n": 107}, {"G": 1, "group": 1368}):
        assert_matches_reference(int4_matmul, IMPLS[name], IMPLS[name].configs[0], drawn(int4_matmul, **sizes))
    with pytest.raises(ValueError, match="k = 3420 and group_size = 3420, but k must be a positive multiple of 8"):
        Int4.pack(torch.zeros(1, 3420), 3420)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the rows of bench.inspect, by variant, of kernels compiled for a Hopper GPU in bfloat16."""
    file = tmp_path_factory.mktemp("inspect") / "rows.jsonl"
    words = "int4_matmul --impl naive gemv splitk prefill --config 0 --size dtype=bfloat16 m=64 n=4096 G=32 --json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", "the command sets this")
        patch.setattr(sys, "argv", ["bench.inspect", *words.split(), str(file)])
        assert inspect.main() == 0
    found = map(json.loads, file.read_text().splitlines())
    return {row["impl"]: row for row in found if row["kernel"].startswith("_int4_matmul")}


def test_kernels_for_hopper_use_wgmma_and_16_byte_loads(compiled: dict[str, dict[str, Any]]) -> None:
    """vllm-project/vllm#15809: barely faster on an H100 than on an A100. Products in kernels for many rows are `wgmma`,
    and all but the first rung load weights 16 bytes at a time."""
    for name in ("splitk", "prefill"):
        products = compiled[name]["loops"][0]["tensor"]
        assert products and all(opcode.startswith("HGMMA") for opcode in products)
    assert {row["loops"][0]["weight_bytes"] for name, row in compiled.items() if name != "naive"} == {16}


def test_default_implementation_by_number_of_rows() -> None:
    """vllm-project/vllm#2551, casper-hansen/AutoAWQ#172, #276, #106, #717: with many rows slower than float16 was."""
    for phase in ("prefill", "decode"):
        choice: Any = configured_choices("cuda", phase)["int4_matmul"]
        assert [choice.lookup(m) for m in (1, 4, 5, 64)] == ["splitk"] * 4
        assert {choice.lookup(m) for m in (65, 4096, 2**20)} <= {"prefill", "dequant"}
        assert configured_choices("cuda", phase)["int4_swiglu"] == "triton"
    gated = int4_swiglu.impls["triton"]
    for target in ("sm_80", "sm_89", "sm_90"):
        rows = [gated.default_config(target, m)["BLOCK_M"] for m in (1, 8, 9, 64, 65, 2**20)]
        assert rows == [8, 8, 16, 64, 128, 128]


def test_instructions_per_weight_are_less_than_half_of_naive(compiled: dict[str, dict[str, Any]]) -> None:
    """NVIDIA/TensorRT-LLM#2509: making numbers of codes cost more than reading fewer bytes gained."""
    for name in ("gemv", "splitk", "prefill"):
        assert compiled[name]["per_unit"] < compiled["naive"]["per_unit"] / 2


@pytest.mark.parametrize("name", ["blocked", "aten", "bags"])
def test_bfloat16_matches_the_reference(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    """vllm-project/vllm#37387: float16 only. Here numbers are checked where they can be, and the instructions of the
    others are those of bfloat16; `test_int4_assembly` has the arithmetic between."""
    args = drawn(int4_matmul, n=16, G=4, dtype="bfloat16")
    assert_matches_reference(int4_matmul, IMPLS[name], IMPLS[name].configs[0], args)
    for impl in ("naive", "splitk", "prefill"):
        assert all("BF16" in opcode for opcode in compiled[impl]["loops"][0]["tensor"])
