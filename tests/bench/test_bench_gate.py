"""The gate sees the memory that is timed and memory that is not, and works out what a call should do once for all."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import Plant, insert, plant  # noqa: F401 (plant: a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

from bench import check, ops
from bench.correctness import error_budget as budgets
from bench.correctness.error_budget import (
    DEVICE,
    Example,
    ExampleCache,
    error_budget,
    example_args,
)
from bench.correctness.example_plan import ExamplePlan
from bench.correctness.find_failure import find_failure
from bench.correctness.gate import MAX_DRAWS, NUM_EXAMPLES, case_error_gate, domain_gate, gate
from bench.correctness.guarded_memory import (
    ALIGNMENT,
    MEMORY_LAYOUTS,
    MemoryLayout,
    bit_pattern,
    guard_tensor,
    map_tensors,
    tensors,
)
from bench.correctness.perturbation import perturbed_args, random_bools, unit_roundoff
from bench.measure.cases import Case
from vila_triton.registry import OPS, Impl, discover

discover()
SWIGLU = OPS["swiglu"]
CASE = Case("swiglu", "test", {"s": 64, "f": 48, "dtype": "float16"})
WRONG = {  # in the kernel of swiglu, by the layout of the arguments that it is wrong for
    "aligned": insert("out += stride_gf == 1 and stride_gs == F", after="out = gate"),
    "strided": insert("out += stride_gs != F", after="out = gate"),
}


@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
def test_kernel_wrong_in_one_layout_is_refused_found_and_replayed(
    layout: MemoryLayout,
    plant: Plant,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant("swiglu", layout, WRONG[layout])
    discover()
    impl = SWIGLU.impls[layout]
    refused = gate(impl, impl.configs[0])
    assert refused and "elements are off" in refused and refused.endswith(f"(its arguments were {layout})")
    assert check.main(["swiglu", "--impl", layout, "--config", "0", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"layout       its arguments were {layout}\n" in said and "do not fail each time" not in said
    replay = ["--replay", str(tmp_path / f"swiglu-{layout}-0.bundle")]
    assert check.main(replay) == 1
    assert f", {layout}, from bench.check\n" in capsys.readouterr().out
    plant("swiglu", layout)  # mended
    assert check.main(replay) == 0


@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
def test_case_is_checked_in_both_layouts(layout: MemoryLayout) -> None:
    def wrong(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        at_the_case = len(x) == 64 and x.is_contiguous() == (layout == "aligned")
        return SWIGLU.reference(x, up) + at_the_case

    impl = Impl("swiglu", "wrong", wrong, [{}], Path(__file__))
    assert gate(impl, {}) is None
    assert (gate(impl, {}, CASE) or "").endswith(f"(its arguments were {layout})")


def remembering(op: str, names: Sequence[str]) -> Impl:
    """The reference, but for these arguments, of which it goes on with what lay at their addresses first."""
    known: dict[tuple, Any] = {}
    parameters = list(inspect.signature(OPS[op].reference).parameters)

    def remembers(*args: Any) -> Any:
        def first(name: str, value: Any) -> Any:
            key = (op, name, *((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors(value)))
            return known.setdefault(key, map_tensors(torch.clone, value)) if name in names else value

        return OPS[op].reference(*map(first, parameters, args))

    return Impl(op, "remembers", remembers, [{}], Path(__file__))


REMEMBERED = [
    ("swiglu", "gate up"),  # the whole answer
    ("linear", "w"),
    ("int4_matmul", "w"),  # as who unpacks a weight once
    ("decode_attention", "cache seq_lens"),  # as who plans a batch once
    ("prefill_attention", "cache"),
    ("kv_write", "slot_mapping"),
    ("rope", "cos"),
]


@pytest.mark.parametrize("op, names", REMEMBERED)
def test_results_remembered_by_address_are_refused_and_found(op: str, names: str) -> None:
    refused = gate(remembering(op, names.split()), {})
    assert refused and "MismatchError" in refused
    found = find_failure(OPS[op], remembering(op, names.split()), {}, 30, 20.0).simplest
    assert found and (names != "gate up" or found.kind == "remembered")


def test_stale_results_of_a_case_are_refused() -> None:
    refused = case_error_gate(remembering("swiglu", ["gate", "up"]), {}, CASE)
    assert refused and refused.endswith("a call with other values in the same memory returned just that before it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1), (5, 7, 3), (2, 300)])
def test_guarded_tensors_have_their_memory_layout(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.rand(shape, device=DEVICE) * 100).to(dtype)
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        aligned, strided = (guard_tensor(x, rng, layout) for layout in ("aligned", "strided"))
        first, last = (int(g.view.storage_offset()) for g in (aligned, strided))
        for g in (aligned, strided):
            assert torch.equal(bit_pattern(g.view), bit_pattern(x)) and g.is_intact()
            assert 4096 <= int(g.view.storage_offset()) <= len(g.buffer) - x.numel() - 4096
        assert aligned.view.is_contiguous() and (aligned.buffer.data_ptr() + first * x.itemsize) % ALIGNMENT == 0
        assert (strided.buffer.data_ptr() + last * x.itemsize) % 16
        assert x.numel() < 2 or not strided.view.is_contiguous()
        aligned.buffer[first + x.numel()] = 3
        assert not aligned.is_intact()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes swiglu's reference was called with; nothing is held yet."""
    calls: list[torch.dtype] = []
    reference = SWIGLU.reference

    @wraps(reference)
    def count(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        calls.append(x.dtype)
        return reference(x, up)

    monkeypatch.setattr(SWIGLU, "reference", count)
    budgets.SHARED_EXAMPLES.examples.clear()
    domain_gate.cache_clear()
    return calls


def test_expected_result_is_computed_once_for_all_implementations(counted: list[torch.dtype]) -> None:
    def right(x: torch.Tensor, up: torch.Tensor, **_: Any) -> torch.Tensor:
        return (torch.nn.functional.silu(x.float()) * up.float()).to(x.dtype)

    impls = [Impl("swiglu", name, right, [{}], Path(__file__)) for name in "abc"]
    assert gate(impls[0], {}, CASE) is None
    once = counted.copy()
    assert once.count(torch.float64) >= 13 * (1 + budgets.NUM_PERTURBATIONS + 2)  # 12 examples and the case
    for impl in impls:
        assert gate(impl, {"num_warps": 1}, CASE) is None and case_error_gate(impl, {}, CASE) is None
    assert counted == once


def test_case_is_gated_on_the_timed_arguments() -> None:
    timed, checked = ops.random_arguments(CASE, torch.device(DEVICE)), []
    fn: Callable = lambda *args: checked.append([x.clone() for x in args]) or SWIGLU.reference(*args)  # noqa: E731
    assert gate(Impl("swiglu", "a", fn, [{}], Path(__file__)), {}, CASE) is None
    for args in checked[-3::2]:  # in both layouts, each after a call with other values
        assert all(torch.equal(x, y) for x, y in zip(args, timed, strict=True))


def test_example_cache_is_bounded_and_keeps_the_latest() -> None:
    def draw(n: int) -> Callable[[], Example]:
        return lambda: Example(SWIGLU, example_args(SWIGLU, 0, s=n, f=10, dtype="float32"))

    held = ExampleCache(10_000)
    small = held.get("small", draw(1))
    assert held.get("small", draw(1)) is small
    large = held.get("large", draw(100))  # 8,000 bytes
    assert set(held.examples) == {"small", "large"}
    assert len(large.expected.exact[0]) == 100 and large.nbytes > 10_000
    assert held.get("large", draw(100)) is large and set(held.examples) == {"large"}
    held.get("small", draw(1))
    assert set(held.examples) == {"small"}


class Randomness(TorchDispatchMode):
    """Counts the bytes that random numbers take, and where they are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.devices = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("generator") is not None:
            self.bytes += out.nbytes
            self.devices.add(kwargs["generator"].device.type)
        return out


def test_perturbations_cost_a_byte_a_number_and_depend_on_the_seed() -> None:
    args = example_args(SWIGLU, 0, s=40, f=300, dtype="float16")
    numbers = sum(x.numel() for x in tensors(args))
    with Randomness() as drawn:
        first = error_budget(SWIGLU, args, seed=3)
    assert 0 < drawn.bytes <= (budgets.NUM_PERTURBATIONS + 2) * numbers and drawn.devices == {DEVICE}
    for x, y in zip(tensors(first), tensors(error_budget(SWIGLU, args, seed=3))):
        assert torch.equal(x, y)
    assert not torch.equal(first[1][0], error_budget(SWIGLU, args, seed=4)[1][0])


@pytest.mark.parametrize("wide", [True, False])
def test_perturbation_moves_numbers_by_one_rounding_and_keeps_integers(wide: bool) -> None:
    x = (torch.rand(1000, 9, device=DEVICE) / 2 + 0.25).half()  # none of them whole
    x[0], codes = 3.0, torch.arange(9, device=DEVICE)
    rng = torch.Generator(DEVICE).manual_seed(0)
    rounds = list(islice(perturbed_args((x, codes), rng, wide), 20))
    moved = torch.stack([near.double() / x.double() - 1 for near, _ in rounds])  # [20, 1000, 9]
    assert all(torch.equal(kept, codes) for _, kept in rounds) and not moved[:, 0].any()
    steps = moved[:, 1:] / unit_roundoff(x.dtype)
    if wide:
        torch.testing.assert_close(steps.abs(), torch.ones_like(steps))
    else:
        assert ((steps.abs() >= 1) & (steps.abs() <= 3)).all()  # one or two numbers of the dtype on
    up = (steps > 0).double()
    assert (up.mean(0) - 0.5).abs().max() < 0.5 and abs(up.mean().item() - 0.5) < 0.01


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (64,)])
def test_random_bools_have_the_requested_shape(shape: tuple[int, ...]) -> None:
    drawn = random_bools(torch.Size(shape), torch.Generator(DEVICE).manual_seed(0))
    assert drawn.shape == shape and drawn.dtype == torch.bool


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("op", ["decode_attention", "prefill_attention"])
def test_plan_finds_the_one_combination_that_is_supported(op: str, seed: int) -> None:
    """As of a library's kernel, that serves plain pages in float16 with heads of 64 or 128 numbers, and no more."""
    plan = ExamplePlan(OPS[op], {}, seed)
    wanted = {"numerics": ("fast",), "kv": ("plain",), "dtype": ("float16",), "d": (64, 128)}
    served = 0
    for sizes, _ in islice(plan, MAX_DRAWS):
        if all(sizes[name] in values for name, values in wanted.items()):
            plan.observe(sizes, [])
            served += 1
        else:
            plan.refuse(sizes)
    assert served >= NUM_EXAMPLES
