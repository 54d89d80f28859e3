"""A planned call gives the driver what the implementation itself would give it, for every kernel there is."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.runtime.jit import JITFunction

from bench.emulator import emulating
from bench.emulator.counters.emulated_sizes import emulated_sizes
from bench.measure.no_launches import DriverLaunch, without_launching
from vila_triton.registry import OPS, Impl, Unsupported, discover, launch_plans, use
from vila_triton.registry.interpreter import uses_triton_kernels
from vila_triton.registry.kernel_config import configured_choices
from vila_triton.registry.launch_plans import CALLS_BEFORE, LaunchPlans, Plan, Recorder
from vila_triton.registry.signature import call_signature
from vila_triton.registry.size_ranges import implementation_names

TARGET = "sm_90"
WITH_TORCH = ("dequant",)  # whose products are torch's
discover()
IMPLS = [impl for op in OPS.values() for impl in op.impls.values() if uses_triton_kernels(impl)]


def decodes(impl: Impl) -> bool:
    """Return True for what a GPU's decode step runs by default; configs/kernels.toml knows no phase of gradients."""
    if impl.op.endswith("_backward"):
        return False
    choice = configured_choices("cuda", "decode").get(impl.op, "")
    return impl.name in implementation_names(choice)


def signature(args: Sequence[Any]) -> Any:
    """The signature of a call with these arguments: a plan serves the calls of one."""
    found = call_signature(tuple(args), {})
    assert found
    return found[0]


def tensors_of(args: Sequence[Any]) -> list[Tensor]:
    """All tensors of arguments, in order."""
    found = call_signature(tuple(args), {})
    assert found
    return found[1]


def described(launches: list[DriverLaunch], args: Sequence[Any], result: Any) -> list[Any]:
    """Launches and results, a tensor as its place among the arguments, or that of its first use and its offset."""
    inputs = {x.data_ptr(): ("argument", i) for i, x in enumerate(tensors_of(args))}
    inputs |= {x.untyped_storage().data_ptr(): ("memory of argument", i) for i, x in enumerate(tensors_of(args))}
    new: dict[int, int] = {}

    def describe(x: Any) -> Any:
        if isinstance(x, Tensor):
            memory = x.untyped_storage().data_ptr()
            if memory in inputs or x.data_ptr() in inputs:
                return inputs.get(x.data_ptr(), (inputs.get(memory), x.storage_offset()))
            return x.dtype, new.setdefault(memory, len(new)), x.storage_offset()
        return tuple(map(describe, x)) if isinstance(x, tuple) else x

    described = [(x.kernel, x.cubin, x.grid, describe(x.args)) for x in launches]
    results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    return [*described, [(describe(x), x.shape, x.stride(), x.dtype) for x in results]]


def example(impl: Impl, seed: int) -> tuple[Any, ...]:
    """Arguments of one signature for each implementation; of one sequence, as the lengths of more are random."""
    op = OPS[impl.op]
    sizes = emulated_sizes(op, impl.name, impl.configs[0])[0] | ({"b": 1} if "b" in op.domain else {})
    return op.make_example(**sizes, rng=torch.Generator().manual_seed(seed), device="cpu")


@triton.jit
def copy_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


def copied(x: Tensor, y: Tensor) -> Tensor:
    """A new tensor that a kernel writes from two others."""
    out = torch.empty_like(x)
    copy_kernel[(1,)](x, out, len(x), BLOCK=16)
    copy_kernel[(1,)](y, out, len(y), BLOCK=16)
    return out


def has_plan(plans: LaunchPlans) -> bool:
    """Return True if calls go by plan, on every stream and thread so far."""
    return bool(plans.plans) and all(isinstance(plan, Plan) for plan in plans.plans.values())


def planned(fn: Any, *args: Tensor, calls: int = CALLS_BEFORE + 1) -> LaunchPlans:
    """The plans of so many calls."""
    plans = LaunchPlans()
    for _ in range(calls):
        plans.run(fn, args, {}, {}, tensors_of(args))
    return plans


@pytest.fixture
def launches() -> Iterator[list[DriverLaunch]]:
    """The launches that a driver is given meanwhile."""
    given: list[DriverLaunch] = []
    with without_launching(TARGET, given.append):
        yield given


def test_calls_are_planned_from_the_third_on(launches: list[DriverLaunch]) -> None:
    x, y = torch.zeros(8), torch.ones(8)
    assert not has_plan(planned(copied, x, y, calls=CALLS_BEFORE)) and has_plan(planned(copied, x, y))


def with_a_copy(x: Tensor, y: Tensor) -> Tensor:
    return copied(x * 1, y)


def with_another_result(x: Tensor, y: Tensor) -> Tensor:
    copied(x, y)
    return x.view(2, 4)


def with_a_function_for_its_grid(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    copy_kernel[lambda _: (1,)](x, out, len(x), BLOCK=16)
    return out


def with_nothing_launched(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


def with_an_operator_that_returns_nothing(x: Tensor, y: Tensor) -> Tensor:
    torch.ops.aten._assert_async(x[0] == 0)
    return copied(x, y)


UNPLANNED = (
    with_a_copy,
    with_another_result,
    with_a_function_for_its_grid,
    with_nothing_launched,
    with_an_operator_that_returns_nothing,
)


@pytest.mark.parametrize("fn", UNPLANNED, ids=lambda fn: fn.__name__)
def test_what_a_plan_could_not_repeat_is_not_planned(fn: Any, launches: list[DriverLaunch]) -> None:
    assert not has_plan(planned(fn, torch.zeros(8), torch.ones(8)))


def test_a_tensor_that_is_given_twice_is_not_planned(launches: list[DriverLaunch]) -> None:
    """Nobody could tell which of the two a kernel was given."""
    x = torch.zeros(8)
    assert not has_plan(planned(copied, x, x))
    plans, y = planned(copied, x, torch.ones(8)), torch.ones(8)
    launches.clear()
    plans.run(copied, (y, y), {}, {}, [y, y])
    assert [launch.args[0] is y for launch in launches] == [True, True]


def test_views_into_arguments_and_new_tensors_move_with_them(launches: list[DriverLaunch]) -> None:
    def halves(x: Tensor, y: Tensor) -> Tensor:
        first, second = torch.empty(2, len(x))
        copy_kernel[(1,)](x[4:], first, 4, BLOCK=16)
        copy_kernel[(1,)](y, second, len(y), BLOCK=16)
        return second

    memory = torch.arange(24.0)
    plans = planned(halves, torch.zeros(8), torch.ones(8))
    launches.clear()
    out = plans.run(pytest.fail, (memory[8:16], memory[:8]), {}, {}, [memory[8:16], memory[:8]])
    (x, first, *_), (y, second, *_) = (launch.args for launch in launches)
    assert x.data_ptr() == memory[12:].data_ptr() and y.data_ptr() == memory.data_ptr()
    assert out.shape == (8,) and out.data_ptr() == second.data_ptr() == first.data_ptr() + 32


def test_parts_of_memory_that_arguments_share_are_not_planned(launches: list[DriverLaunch]) -> None:
    """In the next call the arguments may lie elsewhere, as q, k and v of one product and of three."""

    def second_half(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        copy_kernel[(1,)](y[4:], out, 4, BLOCK=16)
        return out

    memory = torch.zeros(16)
    plans, x, y = planned(second_half, memory[:8], memory[8:]), torch.zeros(8), torch.zeros(8)
    launches.clear()
    plans.run(second_half, (x, y), {}, {}, [x, y])
    assert launches[0].args[0].data_ptr() == y[4:].data_ptr()


def test_one_thread_records_at_a_time(launches: list[DriverLaunch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first to end would take its watch from the other, between two launches of one call."""
    x, y, run = torch.zeros(8), torch.ones(8), JITFunction.run
    plans, other = planned(copied, x, y, calls=CALLS_BEFORE), LaunchPlans()

    def call_from_another_thread(tensors: Sequence[Tensor]) -> Recorder:
        monkeypatch.undo()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return Recorder(tensors)

    def call() -> None:
        for _ in range(CALLS_BEFORE + 1):
            other.run(copied, (x, y), {}, {}, [x, y])

    monkeypatch.setattr(launch_plans, "Recorder", call_from_another_thread)
    plans.run(copied, (x, y), {}, {}, [x, y])
    assert has_plan(plans) and not has_plan(other) and JITFunction.run is run


def test_what_belongs_to_a_stream_or_a_thread_is_planned_for_each(launches: list[DriverLaunch]) -> None:
    counters: dict[int, Tensor] = {}

    def counted(x: Tensor, y: Tensor) -> Tensor:
        if threading.get_ident() not in counters:
            counters[threading.get_ident()] = x.clone()
        out = torch.empty_like(x)
        copy_kernel[(1,)](counters[threading.get_ident()], out, len(x), BLOCK=16)
        return out

    def call() -> None:
        for _ in range(CALLS_BEFORE + 2):
            plans.run(counted, (x, y), {}, {}, [x, y])

    x, y = torch.zeros(8), torch.ones(8)
    plans = planned(counted, x, y)
    launches.clear()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert has_plan(plans) and len(plans.plans) == len(counters) == 2
    assert {launch.args[0].data_ptr() for launch in launches} == {counters[thread.ident or 0].data_ptr()}


def test_launches_that_are_watched_or_replaced_are_not_planned(launches: list[DriverLaunch]) -> None:
    x, y, hook = torch.arange(8.0), torch.arange(8.0), knobs.runtime.launch_enter_hook
    plans, called = planned(copied, x, y), []

    def call(*args: Tensor) -> Tensor:
        called.append(args)
        return copied(*args)

    plans.run(call, (x, y), {}, {}, [x, y])
    assert not called
    hook.add(print)
    try:
        plans.run(call, (x, y), {}, {}, [x, y])
    finally:
        hook.remove(print)
    with emulating(TARGET):
        assert plans.run(call, (x, y), {}, {}, [x, y]).equal(x)
    assert len(called) == 2
    plans.run(call, (x, y), {}, {}, [x, y])
    assert len(called) == 2


def test_a_failure_while_recording_leaves_nothing_changed(launches: list[DriverLaunch]) -> None:
    run, x = JITFunction.run, torch.zeros(8)

    def failing(x: Tensor) -> Tensor:
        raise Unsupported("no")

    plans = LaunchPlans()
    for _ in range(CALLS_BEFORE + 2):
        with pytest.raises(Unsupported):
            plans.run(failing, (x,), {}, {}, [x])
    assert JITFunction.run is run and not has_plan(plans) and torch.zeros(2).sum() == 0


def test_an_op_runs_its_plan_and_its_checks(launches: list[DriverLaunch]) -> None:
    x, weight = torch.zeros(2, 64), torch.zeros(64)
    with use(rms_norm="triton"):
        for _ in range(CALLS_BEFORE + 1):
            OPS["rms_norm"](x, weight, 1e-5)
        OPS["rms_norm"](x + 1, weight, 1e-5)
        decisions = OPS["rms_norm"]._decisions.values()
        assert any(has_plan(plans) for *_, plans, _, _ in decisions)
        OPS["rms_norm"](torch.zeros(129)[1:].view(2, 64), weight, 1e-5)  # another address, another kernel
        with pytest.raises(ValueError, match="weight has shape"):
            OPS["rms_norm"](x, weight[1:], 1e-5)
    assert len(launches) == CALLS_BEFORE + 2 + 1


@pytest.mark.parametrize(
    "impl", [pytest.param(x, id=f"{x.op}-{x.name}", marks=() if decodes(x) else pytest.mark.slow) for x in IMPLS]
)
def test_every_kernel_is_launched_by_plan_as_by_itself(impl: Impl) -> None:
    launches: list[DriverLaunch] = []
    plans, args = LaunchPlans(), example(impl, 0)
    config = impl.configs[0]
    with without_launching(TARGET, launches.append):
        for _ in range(CALLS_BEFORE + 1):
            plans.run(impl.fn, args, {}, config, tensors_of(args))
        assert has_plan(plans) is (impl.name not in WITH_TORCH)
        if impl.name in WITH_TORCH:
            return
        others = example(impl, 1)  # at other addresses
        assert signature(others) == signature(args)
        launches.clear()
        direct = impl.fn(*others, **config)
        expected = described(list(launches), others, direct)
        launches.clear()
        planned = plans.run(lambda *_, **__: pytest.fail("not planned"), others, {}, config, tensors_of(others))
    assert described(launches, others, planned) == expected and len(expected) > 1
