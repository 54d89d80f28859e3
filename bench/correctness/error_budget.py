"""The property test of an implementation: it returns the right values, and touches no other memory.

`assert_matches_reference` runs an implementation in guarded memory and compares it with the reference in float64. There
are no hand-written tolerances: the error that an implementation may make is computed from the error that the reference
makes, see `error_budget`.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any
from unittest import SkipTest

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from torch import Tensor
from triton import knobs

from vila_triton.ops import PagedKV, RaggedBatch
from vila_triton.registry import Impl, IntRange, OneOf, Op, Unsupported

from .guarded_memory import (
    GuardedTensor,
    MemoryLayout,
    MismatchError,
    bit_pattern,
    guard_tensor,
    guarded_allocations,
    map_tensors,
    same_bits,
    tensors,
)
from .perturbation import perturbed_args, unit_roundoff

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = knobs.runtime.interpret
# Triton's interpreter computes wrong numbers in bfloat16, and raises nothing.
UNSUPPORTED_DTYPES = ("bfloat16",) if INTERPRETED else ()
NUM_PERTURBATIONS = 16  # of the arguments, which give the conditioning of each element
MAX_REDRAWS = 8  # until one has the shapes of an example
EXAMPLE_CACHE_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of `SHARED_EXAMPLES`


def axis_strategy(domain: IntRange | OneOf) -> st.SearchStrategy:
    """A hypothesis strategy for one axis of a domain; it shrinks towards the lowest size or the first value."""
    if isinstance(domain, IntRange):
        return st.integers(0, (domain.high - domain.low) // domain.step).map(lambda i: domain.low + i * domain.step)
    return st.sampled_from([v for v in domain.values if v not in UNSUPPORTED_DTYPES])


def example_strategy(op: Op) -> st.SearchStrategy[dict[str, Any]]:
    """A hypothesis strategy for the sizes of one call of the op, and "seed", which its values are drawn from."""
    return st.fixed_dictionaries({**{n: axis_strategy(d) for n, d in op.domain.items()}, "seed": st.integers(0, 2**16)})


def example_args(op: Op, seed: int, **sizes: Any) -> tuple:
    """Arguments of the op at these sizes, on the device that is checked.

    They are random, or with `values` among the sizes the op's hard case of that name; KeyError if there is none.
    """
    values = sizes.pop("values", "random")
    rng = torch.Generator().manual_seed(seed)
    args = op.make_example(**sizes, rng=rng, device=DEVICE)
    return args if values == "random" else op.hard_cases[values](args, rng)


def run_property(check: Callable[[], None]) -> None:
    """Run a hypothesis test that makes its calls through `call_or_reject`; skip it if every call was rejected."""
    _unsupported_reasons.clear()
    try:
        check()
    except Unsatisfiable:
        raise SkipTest(f"supports nothing here: {'; '.join(sorted(_unsupported_reasons))}") from None


def call_or_reject(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """fn(*args, **kwargs); if that raises Unsupported, hypothesis draws another example."""
    try:
        return fn(*args, **kwargs)
    except Unsupported as reason:
        _unsupported_reasons.add(str(reason))
        assume(False)


_unsupported_reasons: set[str] = set()


def float64_reference(op: Op, args: Any) -> list[Tensor]:
    """The outputs of the reference, computed in float64 from the same values."""
    return tensors(op.reference(*map_tensors(lambda x: x.double() if x.is_floating_point() else x.clone(), args)))


def conditioning(op: Op, args: Any, exact: Sequence[Tensor], rng: torch.Generator) -> list[Tensor]:
    """The distance that each element of the exact outputs moves when every input number moves by one rounding: the root
    mean square of 16 draws, `S` of `error_budget`.
    """
    squared_moves = [torch.zeros_like(x) for x in exact]
    for moved_args in islice(perturbed_args(args, rng, in_float64=True), NUM_PERTURBATIONS):
        for total, want, move in zip(squared_moves, exact, float64_reference(op, moved_args)):
            total += (move - want).square()
    return [(total / NUM_PERTURBATIONS).sqrt() for total in squared_moves]


def one_rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of rounding each number to the dtype, `R` of `error_budget`."""
    return unit_roundoff(dtype) * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)


def freedom_of_order(args: Any, rms_move: Tensor, dtype: torch.dtype) -> Tensor:
    """The freedom to sum in any order in float32, `W` of `error_budget`, for outputs of a dtype."""
    longest_axis = max((n for x in tensors(args) for n in x.shape), default=1)
    factor = math.sqrt(2 * longest_axis * math.log(max(rms_move.numel(), 3)))
    return factor * unit_roundoff(torch.float32) / unit_roundoff(dtype) * rms_move


def error_budget(op: Op, args: Any, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """The exact outputs of a call, and the budget of each element, which is the error it may have:

        budget = 2 · (rho · (S + R) + R + W)

    R    one rounding of the output: u · |exact|, u the unit roundoff of its dtype (or half its smallest number)
    S    the distance that the exact output moves (root mean square of 16 draws) when every input number moves by one
         rounding: the conditioning of this element, which no algorithm that rounds can beat on average
    rho  the largest |reference - exact| / (S + R) over all elements, for these arguments and for perturbed ones (3
         calls, more as long as that makes fewer than 64 samples): the error of the reference in this dtype
    W    the freedom to sum in any order in float32: the error of a sum of n terms grows with √n roundings, and the
         worst of N outputs is √(2 ln N) times that, so √(2 n ln N) · S · u(float32) / u; n is the longest axis of the
         arguments

    This is twice the worst error of the reference plus one rounding, scaled to the conditioning of each element. In
    half precision W is negligible, so that a sum accumulated in half precision exceeds the budget. Errors:
    AssertionError if the reference is not finite.
    """
    device = next((x.device for x in tensors(args)), torch.device(DEVICE))
    rng = torch.Generator(device).manual_seed(seed)
    exact = float64_reference(op, args)
    moves = conditioning(op, args, exact, rng)
    perturbations = perturbed_args(args, rng, in_float64=False)
    reference = tensors(op.reference(*map_tensors(torch.clone, args)))
    budgets = []
    for i, (want, reference_out, rms_move) in enumerate(zip(exact, reference, moves)):
        if not want.numel():
            budgets.append(want)
            continue
        assert torch.isfinite(want).all() and torch.isfinite(reference_out).all(), (
            f"{op.name}: the reference is not finite"
        )
        rounding = one_rounding(want, reference_out.dtype)
        rho = ((reference_out.double() - want).abs() / (rms_move + rounding)).amax()
        for near_args in islice(perturbations, max(2, math.ceil(64 / want.numel()) - 1)):
            near_out = tensors(op.reference(*map_tensors(torch.clone, near_args)))[i].double()
            error = (near_out - float64_reference(op, near_args)[i]).abs()
            rho = torch.maximum(rho, (error / (rms_move + rounding)).amax())
        freedom = freedom_of_order(args, rms_move, reference_out.dtype)
        budgets.append(2 * (rho * (rms_move + rounding) + rounding + freedom))
    return exact, budgets


def error_over_budget(actual: Tensor, expected: Tensor, budget: Tensor | None) -> Tensor:
    """The error of each element as a multiple of its budget, in float64; infinite for NaN.

    budget: None if no bit may differ, and a different one is infinitely wrong.
    """
    if budget is None:
        return torch.where(bit_pattern(actual) == bit_pattern(expected), 0.0, math.inf).double()
    return ((actual.double() - expected).abs() / budget).nan_to_num(nan=math.inf, posinf=math.inf)


def argument_names(op: Op, args: Any) -> list[str]:
    """The name of each tensor of the arguments: of its parameter and its fields, as x or cache.k_pages.scales."""

    def names_in(name: str, value: Any) -> list[str]:
        if not is_dataclass(value):
            return [name for _ in tensors(value)]
        return [x for f in fields(value) for x in names_in(f"{name}.{f.name}", getattr(value, f.name))]

    return [x for pair in zip(inspect.signature(op.reference).parameters, args) for x in names_in(*pair)]


@dataclass(frozen=True)
class ExpectedResult:
    """The result that a call should have.

    args_after    the tensors of its arguments as the reference leaves them
    output_specs  (shape, dtype) of each output
    exact         the outputs in float64; of a bitwise exact op, those of the reference
    budgets       the error that each element may have (`error_budget`); of a bitwise exact op, None
    """

    args_after: Sequence[Tensor]
    output_specs: Sequence[tuple[list[int], torch.dtype]]
    exact: Sequence[Tensor]
    budgets: Sequence[Tensor | None]


class Example:
    """The arguments of a call and its expected result, which is computed once for all implementations and configs.

    seed        for the memory that holds the arguments, and for the draws of the budget
    sizes       the sizes that the arguments were drawn for; empty if they come from elsewhere
    call_twice  true for every other seed: a check then makes its call a second time in the same memory
    """

    def __init__(self, op: Op, args: Any, seed: int = 0, sizes: Mapping[str, Any] | None = None):
        self.op, self.args, self.seed, self.sizes = op, args, seed, sizes or {}
        self.call_twice = seed % 2 == 0
        self.nbytes = sum(x.nbytes for x in tensors(args))

    def other_values(self) -> Any:
        """Other values for the same memory, drawn anew where that gives the same shapes. Otherwise numbers are halved
        and codes of quantized tensors inverted; indices stay, since not every index exists.
        """
        for seed in range(self.seed + 1, self.seed + MAX_REDRAWS) if self.sizes else ():
            redrawn = example_args(self.op, seed, **self.sizes)
            if [shape_and_dtype(x) for x in tensors(redrawn)] == [shape_and_dtype(x) for x in tensors(self.args)]:
                return redrawn

        def change_values(value: Any) -> Any:
            if isinstance(value, PagedKV | RaggedBatch):
                return replace(value, **{f.name: change_values(getattr(value, f.name)) for f in fields(value)})
            codes = not isinstance(value, Tensor)
            return map_tensors(lambda x: x / 2 if x.is_floating_point() else ~x if codes else x, value)

        return tuple(map(change_values, self.args))

    @cached_property
    def expected(self) -> ExpectedResult:
        args = map_tensors(torch.clone, self.args)
        outputs = tensors(self.op.reference(*args))  # may write into `args`, if the op does
        pairs = zip(tensors(self.args), tensors(args))
        args_after = [x if same_bits(x, y) else y for x, y in pairs]  # share memory where nothing was written
        exact, budgets = (
            (outputs, [None] * len(outputs)) if self.op.bitwise_exact else error_budget(self.op, self.args, self.seed)
        )
        self.nbytes += sum(x.nbytes for x in (*exact, *budgets, *args_after) if x is not None)
        return ExpectedResult(args_after, [shape_and_dtype(x) for x in outputs], exact, budgets)

    def check(self, impl: Impl, config: Mapping[str, Any], layout: MemoryLayout, call_twice: bool = False) -> None:
        """Run the implementation on this example. Errors: MismatchError, see `assert_matches_reference`.

        call_twice: call it with other values in the same memory first, so that results remembered by address are found.
        """
        rng = torch.Generator().manual_seed(self.seed)
        guards: list[GuardedTensor] = []

        def guard_argument(x: Tensor) -> Tensor:
            guards.append(guard_tensor(x, rng, layout))
            guards[-1].name = names[len(guards) - 1]
            return guards[-1].view

        names = argument_names(self.op, self.args)
        guarded_args = map_tensors(guard_argument, self.args)
        stale_outputs = list[Tensor]()
        if call_twice:
            copy_into(guarded_args, self.other_values())
            with guarded_allocations(guards):
                stale_outputs = [x.clone() for x in tensors(impl(*guarded_args, config=config))]
            copy_into(guarded_args, self.args)
        with guarded_allocations(guards):
            outputs = tensors(impl(*guarded_args, config=config))
        expected = self.expected
        for name, g, want in zip(names, guards, expected.args_after, strict=True):
            if not same_bits(g.view, want):
                message = f"argument {name} is not what the reference leaves"
                raise MismatchError("changed an argument", message, f"argument {name}", g.view, want)
            g.set_expected(want)
            if not g.is_intact():
                raise MismatchError("wrote outside", f"wrote outside argument {name}: {g.describe_damage()}")
        if (output_specs := [shape_and_dtype(x) for x in outputs]) != expected.output_specs:
            raise MismatchError("wrong shape", f"returned {output_specs}, expected {expected.output_specs}")
        self.check_outputs(outputs, stale_outputs)

    def check_outputs(self, outputs: Sequence[Tensor], stale_outputs: Sequence[Tensor] = ()) -> None:
        """MismatchError if an element is beyond its budget, or a bit differs where none may.

        stale_outputs: the outputs of an earlier call with other values in the same memory.
        """
        try:
            self.compare_outputs(outputs)
        except MismatchError as error:
            same_specs = [shape_and_dtype(x) for x in stale_outputs] == [shape_and_dtype(x) for x in outputs]
            if stale_outputs and same_specs and all(map(same_bits, stale_outputs, outputs)):
                error.kind = "remembered"
                error.args = (f"{error}; a call with other values in the same memory returned just that before it",)
            raise

    def compare_outputs(self, outputs: Sequence[Tensor]) -> None:
        triples = zip(outputs, self.expected.exact, self.expected.budgets, strict=True)
        for i, (out, want, budget) in enumerate(triples):
            if budget is not None:
                check_within_budget(i, out, want, budget)
            elif not same_bits(out, want):
                message = f"output {i} differs from the reference in its bits"
                raise MismatchError("wrong bits", message, f"output {i}", out, want)


def copy_into(targets: Any, values: Any) -> None:
    """Copy the tensors of one tree into those of another."""
    for x, value in zip(tensors(targets), tensors(values), strict=True):
        x.copy_(value)


def shape_and_dtype(x: Tensor) -> tuple[list[int], torch.dtype]:
    """Returns the shape of a tensor as a list, and its dtype."""
    return list(x.shape), x.dtype


class ExampleCache:
    """A least-recently-used cache of examples, of at most `max_bytes` together, or of a single larger one."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.examples: dict[Hashable, Example] = {}  # the latest last

    def get(self, key: Hashable, draw: Callable[[], Example]) -> Example:
        """The example with this key, drawn if it is not cached."""
        self.examples[key] = latest = self.examples.pop(key, None) or draw()
        while len(self.examples) > 1 and sum(x.nbytes for x in self.examples.values()) > self.max_bytes:
            del self.examples[next(iter(self.examples))]
        return latest


SHARED_EXAMPLES = ExampleCache(EXAMPLE_CACHE_BYTES[DEVICE])


def shared_example(op: Op, seed: int, **sizes: Any) -> Example:
    """The example of these sizes and this seed, from `SHARED_EXAMPLES`."""
    return SHARED_EXAMPLES.get(
        (op, seed, *sizes.items()), lambda: Example(op, example_args(op, seed, **sizes), seed, sizes)
    )


def assert_matches_reference(
    op: Op, impl: Impl, config: Mapping[str, Any], args: Any, seed: int = 0, layout: MemoryLayout = "strided"
) -> None:
    """MismatchError (an AssertionError) unless the implementation, run on guarded copies of args in this layout,

    - returns tensors of the reference's shapes and dtypes, each element within `error_budget` of the exact value and
      none NaN; for a bitwise exact op, the same bits as the reference;
    - leaves its arguments as the reference leaves them, bit for bit, and the memory around them untouched;
    - writes nothing outside the tensors it allocates, and (interpreted) reads nothing outside them and the arguments.

    `bench.check` and the gates make every other call twice, see `Example.other_values`.
    """
    Example(op, args, seed).check(impl, config, layout)


def check_within_budget(i: int, out: Tensor, want: Tensor, budget: Tensor) -> None:
    """MismatchError if an element of output i is NaN, or further from the exact value than its budget."""
    if not out.numel():
        return
    if count := int(out.isnan().sum()):
        message = f"output {i}: {count} of {out.numel()} elements are NaN"
        raise MismatchError("NaN", message, f"output {i}", out, want, budget)
    multiples = error_over_budget(out, want, budget)
    index = tuple(int(j) for j in torch.unravel_index(multiples.argmax(), multiples.shape))
    if not multiples[index] <= 1:
        message = (
            f"output {i}: {int((multiples > 1).sum())} of {out.numel()} elements are off; the worst, at {index}, "
            f"is {out[index]}, expected {want[index]} ± {budget[index]:.2e} ({multiples[index]:.1f} times the budget)"
        )
        raise MismatchError("beyond budget", message, f"output {i}", out, want, budget)
