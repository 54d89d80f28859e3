"""Offsets beyond 2³¹ elements in every argument, workspace and output of every Triton kernel, along every axis.

Where a kernel takes strides, tensors are restrided so that index 2 of each axis lies beyond 2³¹. Where it takes a
tensor to be contiguous, a call is lengthened by zeros in front: millions of rows or columns, of which only the last
are computed, while outputs and workspaces span them all. Either way the bits are those of ordinary memory. What kernels
touch beyond 2³¹ is recorded, and what they do not must be in UNREACHABLE.

On a GPU, where memory is real, one axis of one tensor at a time is restrided if it fits, and no call is lengthened.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from far_memory import FarMemory, far_strides
from lengthened_calls import COLUMNS, LONGER, Arguments, map_named
from mutants import Plant, by_rule, plant  # noqa: F401 (a fixture)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from watched_launches import Reach, watched_launches

from bench.correctness.error_budget import DEVICE, argument_names, example_args
from bench.correctness.guarded_memory import map_tensors, same_bits, tensors
from vila_triton.registry import OPS, Impl, OneOf, Op, Unsupported, discover
from vila_triton.registry.interpreter import uses_triton_kernels

discover()
CASES = [
    pytest.param(op, impl, config, id=f"{op.name}-{impl.name}-{i}", marks=[pytest.mark.slow] * (i > 0))
    for op in OPS.values()
    for impl in op.impls.values()
    if uses_triton_kernels(impl)
    for i, config in enumerate(impl.configs)
]
# Axes of what kernels take, as `Reach` names them, and why no index along them alone lies beyond 2³¹ elements.
UNREACHABLE = {
    r".* (seq_lens|query_start_loc|context_lens)_ptr\[-1\]": "one a sequence, of which a grid holds fewer than 2³¹",
    r".* (counters_ptr|parts\[1\])\[-1\]": "one a program, of which a grid holds fewer than 2³¹",
    # Of contiguous tensors, axes within one whose index does put elements beyond 2³¹:
    r"_(prefill|decode)_attention(_simple)?_kernel lse_ptr\[-1\]": "query heads",
    r".* split_states\[.\]\[-[12]\]": "heads that share a KV head; numbers of a head",
    r"(?!_int4_matmul_backward).* (gate_|up_)?w\[0\]\[-[123]\]": "tiles along k, which are looped over; lanes; words",
    r"_int4_matmul_backward_kernel w\[0\]\[-[12]\]": "lanes; words",
    r"_int4_matmul_backward_kernel w\[[12]\]\[-1\]": "rows of a weight, which are looped over",
    r"_int4_dequant_kernel out_ptr\[-1\]": "columns of a weight, of which there is a program for every few",
}

# Sizes other than 3, or the first of a list: whole and partial tiles, pages of one and of many, splits or none.
SIZES: dict[str, list[dict[str, Any]]] = {
    "linear": [{"k": 130}],
    "encoder_attention": [{"b": 1, "s": 130, "h": 1}, {}],
    "encoder_attention_backward": [{"b": 1, "s": 70, "h": 1}, {"b": 3, "h": 3}],
    "prefill_attention_backward": [{"b": 1, "s": 70, "g": 1}, {"g": 3, "ratio": 2}],
    "decode_attention": [{"b": 1, "t": 140, "g": 1, "l": 64}, {"t": 100, "ratio": 2}, {"t": 40}],
    "prefill_attention": [{"b": 1, "s": 140, "t": 140, "g": 1, "l": 64}, {"t": 70, "ratio": 2}],
    "rms_norm_backward": [{"rows": 40}],
    "kv_write": [{"s": 40}],
    "rope_kv_write": [{"s": 40, "ratio": 2}],
}
# Sizes of which every value is tried, beside the others of the last call.
VARIED = ("kv", "group", "order", "bias", "residual")
RESULT = "result"
# The axes of results that those kernels take strides of; of others, all.
RESULT_AXES = {"linear": [0], "int4_matmul": [0], "int4_matmul_backward": [0], "int4_swiglu": [0]}
# These take strides of float32, too, which elsewhere is contiguous by contract.
STRIDED_FLOAT32 = {"rms_norm_backward", "encoder_attention", "encoder_attention_backward", "prefill_attention_backward"}
MAX_GROWTH = 2**28  # bytes of resident memory: that of a whole process then stays below 1 GB

Places = list[tuple[str, int]]  # an argument by its name, or RESULT, and an axis
Allocate = Callable[[Tensor], Tensor]


class PlacedAllocations(TorchDispatchMode):
    """Inside, empty tensors are what `allocate` returns for ones like them on the meta device."""

    factories = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self, allocate: Allocate) -> None:
        super().__init__()
        self.allocate = allocate

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.factories:
            like = func(*args, **{**(kwargs or {}), "device": "meta"})
            if like.numel():
                return self.allocate(like)
        return func(*args, **(kwargs or {}))


def zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=DEVICE)


def outputs(impl: Impl, args: Arguments, options: Mapping[str, Any], allocate: Allocate = zeros) -> list[Tensor]:
    with PlacedAllocations(allocate):
        return tensors(impl(*args, **options))


def watched(reach: Reach | None = None, first: int = 4, last: int = 4) -> AbstractContextManager:
    return watched_launches(reach or Reach(), first, last) if DEVICE == "cpu" else nullcontext()


def examples(op: Op) -> Iterator[Arguments]:
    """Small arguments in float16, with every format of pages and every kind of weight."""
    usual = {n: d.values[0] if isinstance(d, OneOf) else min(d.high, 3) for n, d in op.domain.items()}
    sizes = [usual | {"dtype": "float16"} | chosen for chosen in SIZES.get(op.name, [{}])]
    for name in VARIED:
        domain = op.domain.get(name)
        sizes += [sizes[-1] | {name: value} for value in domain.values[1:]] if isinstance(domain, OneOf) else []
    return (example_args(op, 0, **each) for each in sizes)


def places_of(op: Op, impl: Impl, args: Arguments) -> Places:
    """Every axis of three elements or more of each argument, and those of results that may have any strides."""
    named = zip(argument_names(op, args), tensors(args))
    places = [(name, axis) for name, x in named for axis in range(x.dim()) if x.shape[axis] > 2]
    axes = [] if impl.name == "dequant" else RESULT_AXES.get(op.name, range(4))
    return places + [(RESULT, axis) for axis in axes]


def restrided_outputs(
    op: Op, impl: Impl, args: Arguments, options: Any, places: Places, far: FarMemory
) -> list[Tensor]:
    """The outputs of a call with far strides at these places."""

    def is_strided(like: Tensor) -> bool:
        return like.dtype == torch.float16 or op.name in STRIDED_FLOAT32

    def restride(name: str, x: Tensor) -> Tensor:
        return far.spread(x, far_strides(x.shape, [axis for place, axis in places if place == name]))

    def allocate(like: Tensor) -> Tensor:
        axes = [axis for place, axis in places if place == RESULT and axis < like.dim() and like.shape[axis] > 2]
        strides = far_strides(like.shape, axes if is_strided(like) else [])
        return far.empty_strided(like.shape, strides, like.dtype)

    return outputs(impl, map_named(op, args, restride), options, allocate)


def check_restrided(op: Op, impl: Impl, config: Mapping[str, Any], reach: Reach) -> None:
    """Every place far at once, on a GPU one after the other; if bits differ, the places that make them differ."""
    options: dict[str, Any] = {"config": {**config, **({"SPLIT_K": 1} if "SPLIT_K" in config else {})}}
    options |= {"return_lse": True} if op.name == "encoder_attention" else {}
    no_room = []
    for args in examples(op) if DEVICE == "cpu" else islice(examples(op), 1):
        try:
            with watched():
                expected = outputs(impl, map_tensors(torch.clone, args), options)
        except Unsupported:
            continue

        def differs(places: Places, args: Arguments = args, expected: list[Tensor] = expected) -> bool:
            try:
                with FarMemory() as far, watched(reach):
                    found = restrided_outputs(op, impl, args, options, places, far)
                    return not all(map(same_bits, found, expected))
            except pytest.skip.Exception:
                no_room.extend(places)
                return False

        places = places_of(op, impl, args)
        if DEVICE == "cuda" or differs(places):
            wrong = [f"{name}[{axis}]" for name, axis in places if differs([(name, axis)])]
            assert DEVICE == "cuda" and not wrong, f"wrong with far strides of {', '.join(wrong) or 'several'}"
    if no_room:
        pytest.skip(f"no room for {no_room}; the others have passed")


def last_rows_linear(count: int) -> Any:
    """Within, torch's products are of the last rows of a weight."""
    linear = F.linear
    return patch.object(F, "linear", lambda x, w, bias: linear(x, *(y[-count:].clone() for y in (w, bias))))


def check_lengthened(op: Op, impl: Impl, config: Mapping[str, Any], reach: Reach) -> None:
    """The last rows and columns of each output are those of the call that is not longer."""
    with FarMemory() as far, last_rows_linear(COLUMNS):
        for call in LONGER[op.name](op, impl, config, far) if op.name in LONGER else ():
            try:
                expected = outputs(impl, call.args, call.options)
            except Unsupported:
                continue
            with watched(reach, call.first, call.last):
                found = outputs(impl, call.longer_args, call.options, lambda like: far.empty(like.shape, like.dtype))
            shapes = [list(x.shape) for x in tensors(call.longer_args)]
            for x, end in zip(found, expected, strict=True):
                is_same = same_bits(x[tuple(slice(-n, None) for n in end.shape)], end)
                assert is_same, f"wrong with {dict(zip(argument_names(op, call.args), shapes))}"


@contextmanager
def bounded_growth() -> Iterator[None]:
    """At no time has the process MAX_GROWTH more resident memory than at the beginning."""

    def resident(name: str) -> int:
        return 1024 * int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest, to the present one
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < MAX_GROWTH


@pytest.mark.on_gpu
@pytest.mark.parametrize("op, impl, config", CASES)
def test_offsets_beyond_32_bits(op: Op, impl: Impl, config: Mapping[str, Any]) -> None:
    reach = Reach()
    if DEVICE == "cuda":
        return check_restrided(op, impl, config, reach)
    with bounded_growth():
        check_restrided(op, impl, config, reach)
        check_lengthened(op, impl, config, reach)
    assert reach.axes
    assert reach.missing == {name for name in reach.axes if any(re.fullmatch(axes, name) for axes in UNREACHABLE)}


@pytest.mark.skipif(DEVICE == "cuda", reason="no call is lengthened on a GPU")
def test_dropped_casts_to_int64_are_found(plant: Plant) -> None:  # noqa: F811
    """One of a kernel that takes strides, and one of a kernel that takes a weight to be contiguous."""
    dropped = "drop a cast to int64"
    plant("rms_norm", "row", by_rule(dropped, "tl.program_id(0).to(tl.int64)"))
    plant("int4_matmul", "group", by_rule(dropped, "tl.full([1, 1], start // GROUP_SIZE, tl.int64)"))
    discover()
    impl = OPS["rms_norm"].impls["row"]
    with pytest.raises(AssertionError, match=r"wrong with far strides of x\[0\], result\[0\]"):
        check_restrided(OPS["rms_norm"], impl, impl.configs[0], Reach())
    impl = OPS["int4_matmul"].impls["group"]
    with pytest.raises(AssertionError, match=r"wrong with .*'w\.scales': \[3, 1073741833\]"):
        check_lengthened(OPS["int4_matmul"], impl, impl.configs[0], Reach())
