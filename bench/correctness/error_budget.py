"""Does an implementation compute what its op means, and touch nothing else?

`assert_faithful` runs it on guarded memory and compares it with the reference in float64. No tolerance is written down
anywhere: what an implementation may deviate by is derived from what the reference deviates by, see `budget`.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
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
    tensors,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = knobs.runtime.interpret
# Triton's interpreter computes wrong numbers in bfloat16 without saying so.
UNSUPPORTED_DTYPES = ("bfloat16",) if INTERPRETED else ()
NUM_PERTURBATIONS = 16  # of neighbouring arguments, from which the conditioning of an element is taken
MAX_REDRAWS = 8  # draws, one of which may have the shapes of an example
EXAMPLE_CACHE_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of the examples that are shared


def axis_strategy(domain: IntRange | OneOf) -> st.SearchStrategy:
    """Draws from one axis of a domain; shrinks towards its lowest size or its first value."""
    if isinstance(domain, IntRange):
        return st.integers(0, (domain.high - domain.low) // domain.step).map(lambda i: domain.low + i * domain.step)
    return st.sampled_from([v for v in domain.values if v not in UNSUPPORTED_DTYPES])


def example_strategy(op: Op) -> st.SearchStrategy[dict[str, Any]]:
    """Sizes of one call of the op, and the seed of its values."""
    return st.fixed_dictionaries({**{n: axis_strategy(d) for n, d in op.domain.items()}, "seed": st.integers(0, 2**16)})


def example_args(op: Op, seed: int, **sizes: Any) -> tuple:
    """The arguments an example stands for."""
    return op.make_example(**sizes, rng=torch.Generator().manual_seed(seed), device=DEVICE)


def run_property(check: Callable[[], None]) -> None:
    """Run a hypothesis test that makes its calls through `supported`; skip it if not one of them was supported."""
    _unsupported_reasons.clear()
    try:
        check()
    except Unsatisfiable:
        raise SkipTest(f"supports nothing here: {'; '.join(sorted(_unsupported_reasons))}") from None


def call_or_reject(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """fn(*args), or another example if that is Unsupported."""
    try:
        return fn(*args, **kwargs)
    except Unsupported as reason:
        _unsupported_reasons.add(str(reason))
        assume(False)


_unsupported_reasons: set[str] = set()


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def random_bools(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """As many fair coins, drawn on the device of the generator: eight from a random byte."""
    count = shape.numel()
    random_bytes = torch.empty(-(-count // 8), dtype=torch.uint8, device=rng.device).random_(0, 256, generator=rng)
    bit_masks = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=rng.device)
    return (random_bytes & bit_masks[:, None]).ne(0).flatten()[:count].view(shape)


def perturbed_args(args: Any, rng: torch.Generator, in_float64: bool) -> Iterator[Any]:
    """Neighbouring arguments, without end: each number moved one rounding unit of its dtype up or down (in float64 if
    `wide`). Whole numbers stay: they are codes, and arithmetic on them is exact.
    """

    def bounds(x: Tensor) -> tuple[Tensor, Tensor]:
        step = unit_roundoff(x.dtype) * (1 if in_float64 else 2)
        exact, is_integer = x.double(), x == x.round()
        low, high = (torch.where(is_integer, exact, exact * (1 + s)) for s in (-step, step))
        return (low, high) if in_float64 else (low.to(x.dtype), high.to(x.dtype))

    def pick_bound(pairs: Iterator[tuple[Tensor, Tensor] | None], x: Tensor) -> Tensor:
        pair = next(pairs)
        return torch.where(random_bools(x.shape, rng), *pair) if pair else x

    pairs = [bounds(x) if x.is_floating_point() else None for x in tensors(args)]
    while True:
        yield map_tensors(partial(pick_bound, iter(pairs)), args)


def float64_reference(op: Op, args: Any) -> list[Tensor]:
    """What the reference returns in float64 for the same values."""
    return tensors(op.reference(*map_tensors(lambda x: x.double() if x.is_floating_point() else x.clone(), args)))


def error_budget(op: Op, args: Any, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """The exact outputs, and how far from them each element may lie: 2 · (rho · (S + R) + R + W).

    R    one rounding of the output: u · |exact|, u the unit roundoff of its dtype (or half its smallest number)
    S    how far the exact output moves (root mean square of 16 draws) when every input number moves by one rounding:
         the conditioning of this very element, which no algorithm that rounds can beat on average
    rho  the largest |reference - exact| / (S + R) over all elements, for these arguments and for neighbours one
         rounding away (3 calls, more while that makes fewer than 64 samples): what the reference needs at this dtype
    W    freedom to sum in any order in float32: a sum of n terms walks √n roundings, the worst of N outputs
         √(2 ln N) times as far, so √(2 n ln N) · S · u(float32) / u; n is the longest axis of the arguments

    So it is twice the worst error of the reference plus one rounding, scaled to the conditioning of each element. In
    half precision W is next to nothing, so a sum kept in half precision shows.
    """
    device = next((x.device for x in tensors(args)), torch.device(DEVICE))
    rng = torch.Generator(device).manual_seed(seed)
    exact = float64_reference(op, args)
    squared_moves = [torch.zeros_like(x) for x in exact]
    for moved_args in islice(perturbed_args(args, rng, in_float64=True), NUM_PERTURBATIONS):
        for total, want, move in zip(squared_moves, exact, float64_reference(op, moved_args)):
            total += (move - want).square()
    perturbations = perturbed_args(args, rng, in_float64=False)
    reference = tensors(op.reference(*map_tensors(torch.clone, args)))
    longest_axis = max((n for x in tensors(args) for n in x.shape), default=1)
    budgets = []
    for i, (want, reference_out, total) in enumerate(zip(exact, reference, squared_moves)):
        if not want.numel():
            budgets.append(want)
            continue
        assert torch.isfinite(want).all() and torch.isfinite(reference_out).all(), (
            f"{op.name}: the reference is not finite"
        )
        u = unit_roundoff(reference_out.dtype)
        rounding = u * want.abs().clamp(min=torch.finfo(reference_out.dtype).smallest_normal)
        rms_move = (total / NUM_PERTURBATIONS).sqrt()
        rho = ((reference_out.double() - want).abs() / (rms_move + rounding)).amax()
        for near_args in islice(perturbations, max(2, math.ceil(64 / want.numel()) - 1)):
            error = (
                tensors(op.reference(*map_tensors(torch.clone, near_args)))[i].double()
                - float64_reference(op, near_args)[i]
            ).abs()
            rho = torch.maximum(rho, (error / (rms_move + rounding)).amax())
        summation = math.sqrt(2 * longest_axis * math.log(max(want.numel(), 3))) * unit_roundoff(torch.float32) / u
        budgets.append(2 * (rho * (rms_move + rounding) + rounding + summation * rms_move))
    return exact, budgets


def error_over_budget(actual: Tensor, expected: Tensor, budget: Tensor | None) -> Tensor:
    """How many times its budget each element is off, in float64; infinite for NaN and for a bit that may not differ."""
    if budget is None:
        return torch.where(bit_pattern(actual) == bit_pattern(expected), 0.0, math.inf).double()
    return ((actual.double() - expected).abs() / budget).nan_to_num(nan=math.inf, posinf=math.inf)


def argument_names(op: Op, args: Any) -> list[str]:
    """For every tensor of the arguments the name of its parameter, and of its fields: x, w.scales, cache.k_pages.scales."""

    def names_in(name: str, value: Any) -> list[str]:
        if not is_dataclass(value):
            return [name for _ in tensors(value)]
        return [x for f in fields(value) for x in names_in(f"{name}.{f.name}", getattr(value, f.name))]

    return [x for pair in zip(inspect.signature(op.reference).parameters, args) for x in names_in(*pair)]


@dataclass(frozen=True)
class ExpectedResult:
    """What a call should do.

    after    its arguments as the reference leaves them
    outputs  (shape, dtype) of each
    exact    the outputs, and
    allowed  how far from them an element may lie (see `budget`); of an `exact` op those of the reference, and None
    """

    args_after: Sequence[Tensor]
    output_specs: Sequence[tuple[list[int], torch.dtype]]
    exact: Sequence[Tensor]
    budgets: Sequence[Tensor | None]


class Example:
    """Arguments, and what a call with them should do, which is worked out once for all implementations and configs.

    seed    of the memory the arguments are laid in, and of the draws of the budget
    sizes   what the arguments were drawn for, if they were
    twice   whether a check is to make its call a second time: every other seed
    """

    def __init__(self, op: Op, args: Any, seed: int = 0, sizes: Mapping[str, Any] | None = None):
        self.op, self.args, self.seed, self.sizes = op, args, seed, sizes or {}
        self.call_twice = seed % 2 == 0
        self.nbytes = sum(x.nbytes for x in tensors(args))

    def other_values(self) -> Any:
        """Other values for the same memory: drawn anew where that gives the same shapes; else numbers are halved and
        codes of quantised leaves inverted, and what indexes stays, since not every index exists.
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
        outputs = tensors(self.op.reference(*args))  # may write into `left`, if that is what the op does
        pairs = zip(tensors(self.args), tensors(args))
        args_after = [
            x if torch.equal(bit_pattern(x), bit_pattern(y)) else y for x, y in pairs
        ]  # the same memory where nothing is written
        exact, budgets = (
            (outputs, [None] * len(outputs)) if self.op.bitwise_exact else error_budget(self.op, self.args, self.seed)
        )
        self.nbytes += sum(x.nbytes for x in (*exact, *budgets, *args_after) if x is not None)
        return ExpectedResult(args_after, [shape_and_dtype(x) for x in outputs], exact, budgets)

    def check(self, impl: Impl, config: Mapping[str, Any], layout: MemoryLayout, call_twice: bool = False) -> None:
        """As `assert_faithful`; `twice`: after a call with other values in the same memory, so that who remembers
        something by its address is wrong.
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
            if not torch.equal(bit_pattern(g.view), bit_pattern(want)):
                message = f"argument {name} is not what the reference leaves"
                raise MismatchError("changed an argument", message, f"argument {name}", g.view, want)
            g.set_expected(want)
            if not g.is_intact():
                raise MismatchError("wrote outside", f"wrote outside argument {name}: {g.describe_damage()}")
        if (output_specs := [shape_and_dtype(x) for x in outputs]) != expected.output_specs:
            raise MismatchError("wrong shape", f"returned {output_specs}, expected {expected.output_specs}")
        self.check_outputs(outputs, stale_outputs)

    def check_outputs(self, outputs: Sequence[Tensor], stale_outputs: Sequence[Tensor] = ()) -> None:
        """`Unfaithful` if an element lies beyond its budget, or a bit differs where none may. `before`: what a call
        with other values in the same memory returned.
        """
        try:
            self.compare_outputs(outputs)
        except MismatchError as error:
            same_specs = [shape_and_dtype(x) for x in stale_outputs] == [shape_and_dtype(x) for x in outputs]
            if (
                stale_outputs
                and same_specs
                and all(torch.equal(bit_pattern(x), bit_pattern(y)) for x, y in zip(stale_outputs, outputs))
            ):
                error.kind = "remembered"
                error.args = (f"{error}; a call with other values in the same memory returned just that before it",)
            raise

    def compare_outputs(self, outputs: Sequence[Tensor]) -> None:
        triples = zip(outputs, self.expected.exact, self.expected.budgets, strict=True)
        for i, (out, want, budget) in enumerate(triples):
            if budget is not None:
                check_within_budget(i, out, want, budget)
            elif not torch.equal(bit_pattern(out), bit_pattern(want)):
                message = f"output {i} differs from the reference in its bits"
                raise MismatchError("wrong bits", message, f"output {i}", out, want)


def copy_into(targets: Any, values: Any) -> None:
    """Write other values into the tensors of a tree."""
    for x, value in zip(tensors(targets), tensors(values), strict=True):
        x.copy_(value)


def shape_and_dtype(x: Tensor) -> tuple[list[int], torch.dtype]:
    return list(x.shape), x.dtype


class ExampleCache:
    """The examples asked for last: together of at most so many bytes, or one of more."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.examples: dict[Hashable, Example] = {}  # the latest last

    def get(self, key: Hashable, draw: Callable[[], Example]) -> Example:
        """The example of that name; drawn if it is not held."""
        self.examples[key] = latest = self.examples.pop(key, None) or draw()
        while len(self.examples) > 1 and sum(x.nbytes for x in self.examples.values()) > self.max_bytes:
            del self.examples[next(iter(self.examples))]
        return latest


SHARED_EXAMPLES = ExampleCache(EXAMPLE_CACHE_BYTES[DEVICE])


def shared_example(op: Op, seed: int, **sizes: Any) -> Example:
    """The example of these sizes and this seed, shared by all that ask for it."""
    return SHARED_EXAMPLES.get(
        (op, seed, *sizes.items()), lambda: Example(op, example_args(op, seed, **sizes), seed, sizes)
    )


def assert_matches_reference(
    op: Op, impl: Impl, config: Mapping[str, Any], args: Any, seed: int = 0, layout: MemoryLayout = "strided"
) -> None:
    """`Unfaithful` (an AssertionError) unless the implementation, run on guarded copies of args laid out so,

    - returns tensors of the reference's shapes and dtypes, each element within `budget` of the exact value and none
      NaN; for an `exact` op the very bits of the reference;
    - leaves its arguments as the reference leaves them, bit for bit, and the memory around them untouched;
    - writes nothing outside the tensors it allocates, and (interpreted) reads nothing outside them and the arguments.

    `bench.check` and the gates make every other call twice, see `Example.others`.
    """
    Example(op, args, seed).check(impl, config, layout)


def check_within_budget(i: int, out: Tensor, want: Tensor, budget: Tensor) -> None:
    """`Unfaithful` if an element of output i is NaN or further from the exact value than allowed."""
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
