"""Does an implementation compute what its op means, and touch nothing else?

`assert_faithful` runs it on guarded memory and compares it with the reference in float64. No tolerance is written down
anywhere: what an implementation may deviate by is derived from what the reference deviates by, see `budget`.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
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

from vila_triton.registry import Impl, OneOf, Op, Sizes, Unsupported

from .guarded_memory import Guarded, Layout, Unfaithful, bits, canaries, guard, mapped, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = knobs.runtime.interpret
# Triton's interpreter computes wrong numbers in bfloat16 without saying so.
LEFT_OUT = ("bfloat16",) if INTERPRETED else ()
DRAWS = 16  # of neighbouring arguments, from which the conditioning of an element is taken
TRIES = 8  # draws, one of which may have the shapes of an example
KEPT_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of the examples that are shared


def strategy(domain: Sizes | OneOf) -> st.SearchStrategy:
    """Draws from one axis of a domain; shrinks towards its lowest size or its first value."""
    if isinstance(domain, Sizes):
        return st.integers(0, (domain.high - domain.low) // domain.step).map(lambda i: domain.low + i * domain.step)
    return st.sampled_from([v for v in domain.values if v not in LEFT_OUT])


def examples(op: Op) -> st.SearchStrategy[dict[str, Any]]:
    """Sizes of one call of the op, and the seed of its values."""
    return st.fixed_dictionaries({**{n: strategy(d) for n, d in op.domain.items()}, "seed": st.integers(0, 2**16)})


def arguments(op: Op, seed: int, **sizes: Any) -> tuple:
    """The arguments an example stands for."""
    return op.example(**sizes, rng=torch.Generator().manual_seed(seed), device=DEVICE)


def hold(check: Callable[[], None]) -> None:
    """Run a hypothesis test that makes its calls through `supported`; skip it if not one of them was supported."""
    _reasons.clear()
    try:
        check()
    except Unsatisfiable:
        raise SkipTest(f"supports nothing here: {'; '.join(sorted(_reasons))}") from None


def supported(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """fn(*args), or another example if that is Unsupported."""
    try:
        return fn(*args, **kwargs)
    except Unsupported as reason:
        _reasons.add(str(reason))
        assume(False)


_reasons: set[str] = set()


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def coins(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """As many fair coins, drawn on the device of the generator: eight from a random byte."""
    count = shape.numel()
    drawn = torch.empty(-(-count // 8), dtype=torch.uint8, device=rng.device).random_(0, 256, generator=rng)
    places = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=rng.device)
    return (drawn & places[:, None]).ne(0).flatten()[:count].view(shape)


def neighbours(args: Any, rng: torch.Generator, wide: bool) -> Iterator[Any]:
    """Neighbouring arguments, without end: each number moved one rounding unit of its dtype up or down (in float64 if
    `wide`). Whole numbers stay: they are codes, and arithmetic on them is exact.
    """

    def ends(x: Tensor) -> tuple[Tensor, Tensor]:
        step = unit_roundoff(x.dtype) * (1 if wide else 2)
        exact, whole = x.double(), x == x.round()
        low, high = (torch.where(whole, exact, exact * (1 + s)) for s in (-step, step))
        return (low, high) if wide else (low.to(x.dtype), high.to(x.dtype))

    def either(pairs: Iterator[tuple[Tensor, Tensor] | None], x: Tensor) -> Tensor:
        pair = next(pairs)
        return torch.where(coins(x.shape, rng), *pair) if pair else x

    pairs = [ends(x) if x.is_floating_point() else None for x in tensors(args)]
    while True:
        yield mapped(partial(either, iter(pairs)), args)


def exactly(op: Op, args: Any) -> list[Tensor]:
    """What the reference returns in float64 for the same values."""
    return tensors(op.reference(*mapped(lambda x: x.double() if x.is_floating_point() else x.clone(), args)))


def budget(op: Op, args: Any, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
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
    exact = exactly(op, args)
    squares = [torch.zeros_like(x) for x in exact]
    for far in islice(neighbours(args, rng, wide=True), DRAWS):
        for total, want, move in zip(squares, exact, exactly(op, far)):
            total += (move - want).square()
    near = neighbours(args, rng, wide=False)
    reference = tensors(op.reference(*mapped(torch.clone, args)))
    longest = max((n for x in tensors(args) for n in x.shape), default=1)
    allowed = []
    for i, (want, low, total) in enumerate(zip(exact, reference, squares)):
        if not want.numel():
            allowed.append(want)
            continue
        assert torch.isfinite(want).all() and torch.isfinite(low).all(), f"{op.name}: the reference is not finite"
        u = unit_roundoff(low.dtype)
        rounding = u * want.abs().clamp(min=torch.finfo(low.dtype).smallest_normal)
        moved = (total / DRAWS).sqrt()
        rho = ((low.double() - want).abs() / (moved + rounding)).amax()
        for beside in islice(near, max(2, math.ceil(64 / want.numel()) - 1)):
            off = (tensors(op.reference(*mapped(torch.clone, beside)))[i].double() - exactly(op, beside)[i]).abs()
            rho = torch.maximum(rho, (off / (moved + rounding)).amax())
        walk = math.sqrt(2 * longest * math.log(max(want.numel(), 3))) * unit_roundoff(torch.float32) / u
        allowed.append(2 * (rho * (moved + rounding) + rounding + walk * moved))
    return exact, allowed


def excess(got: Tensor, want: Tensor, allowed: Tensor | None) -> Tensor:
    """How many times its budget each element is off, in float64; infinite for NaN and for a bit that may not differ."""
    if allowed is None:
        return torch.where(bits(got) == bits(want), 0.0, math.inf).double()
    return ((got.double() - want).abs() / allowed).nan_to_num(nan=math.inf, posinf=math.inf)


def argument_names(op: Op, args: Any) -> list[str]:
    """For every tensor of the arguments the name of its parameter, and of its field in it: x, w.scales."""
    found = []
    for name, value in zip(inspect.signature(op.reference).parameters, args):
        parts = fields(value) if is_dataclass(value) else ()
        inner = [f"{name}.{part.name}" for part in parts for _ in tensors(getattr(value, part.name))]
        found += inner or [name for _ in tensors(value)]
    return found


@dataclass(frozen=True)
class Expected:
    """What a call should do.

    after    its arguments as the reference leaves them
    outputs  (shape, dtype) of each
    exact    the outputs, and
    allowed  how far from them an element may lie (see `budget`); of an `exact` op those of the reference, and None
    """

    after: Sequence[Tensor]
    outputs: Sequence[tuple[list[int], torch.dtype]]
    exact: Sequence[Tensor]
    allowed: Sequence[Tensor | None]


class Example:
    """Arguments, and what a call with them should do, which is worked out once for all implementations and configs.

    seed    of the memory the arguments are laid in, and of the draws of the budget
    sizes   what the arguments were drawn for, if they were
    twice   whether a check is to make its call a second time: every other seed
    """

    def __init__(self, op: Op, args: Any, seed: int = 0, sizes: Mapping[str, Any] | None = None):
        self.op, self.args, self.seed, self.sizes = op, args, seed, sizes or {}
        self.twice = seed % 2 == 0
        self.nbytes = sum(x.nbytes for x in tensors(args))

    def others(self) -> Any:
        """Other values for the same memory: drawn anew where that gives the same shapes; else numbers are halved and
        codes of quantised leaves inverted, and what indexes stays, since not every index exists.
        """
        for seed in range(self.seed + 1, self.seed + TRIES) if self.sizes else ():
            drawn = arguments(self.op, seed, **self.sizes)
            if [shape_of(x) for x in tensors(drawn)] == [shape_of(x) for x in tensors(self.args)]:
                return drawn

        def other(value: Any) -> Any:
            codes = not isinstance(value, Tensor)
            return mapped(lambda x: x / 2 if x.is_floating_point() else ~x if codes else x, value)

        return tuple(map(other, self.args))

    @cached_property
    def expected(self) -> Expected:
        left = mapped(torch.clone, self.args)
        outputs = tensors(self.op.reference(*left))  # may write into `left`, if that is what the op does
        both = zip(tensors(self.args), tensors(left))
        after = [x if torch.equal(bits(x), bits(y)) else y for x, y in both]  # the same memory where nothing is written
        exact, allowed = (outputs, [None] * len(outputs)) if self.op.exact else budget(self.op, self.args, self.seed)
        self.nbytes += sum(x.nbytes for x in (*exact, *allowed, *after) if x is not None)
        return Expected(after, [shape_of(x) for x in outputs], exact, allowed)

    def check(self, impl: Impl, config: Mapping[str, Any], layout: Layout, twice: bool = False) -> None:
        """As `assert_faithful`; `twice`: after a call with other values in the same memory, so that who remembers
        something by its address is wrong.
        """
        rng = torch.Generator().manual_seed(self.seed)
        guards: list[Guarded] = []

        def guarded(x: Tensor) -> Tensor:
            guards.append(guard(x, rng, layout))
            guards[-1].name = names[len(guards) - 1]
            return guards[-1].view

        names = argument_names(self.op, self.args)
        held = mapped(guarded, self.args)
        before = list[Tensor]()
        if twice:
            fill(held, self.others())
            with canaries(guards):
                before = [x.clone() for x in tensors(impl(*held, config=config))]
            fill(held, self.args)
        with canaries(guards):
            outputs = tensors(impl(*held, config=config))
        expected = self.expected
        for name, g, want in zip(names, guards, expected.after, strict=True):
            if not torch.equal(bits(g.view), bits(want)):
                message = f"argument {name} is not what the reference leaves"
                raise Unfaithful("changed an argument", message, f"argument {name}", g.view, want)
            g.expect(want)
            if not g.intact():
                raise Unfaithful("wrote outside", f"wrote outside argument {name}: {g.damage()}")
        if (got := [shape_of(x) for x in outputs]) != expected.outputs:
            raise Unfaithful("wrong shape", f"returned {got}, expected {expected.outputs}")
        self.check_numbers(outputs, before)

    def check_numbers(self, outputs: Sequence[Tensor], before: Sequence[Tensor] = ()) -> None:
        """`Unfaithful` if an element lies beyond its budget, or a bit differs where none may. `before`: what a call
        with other values in the same memory returned.
        """
        try:
            self.compare(outputs)
        except Unfaithful as error:
            alike = [shape_of(x) for x in before] == [shape_of(x) for x in outputs]
            if before and alike and all(torch.equal(bits(x), bits(y)) for x, y in zip(before, outputs)):
                error.kind = "remembered"
                error.args = (f"{error}; a call with other values in the same memory returned just that before it",)
            raise

    def compare(self, outputs: Sequence[Tensor]) -> None:
        each = zip(outputs, self.expected.exact, self.expected.allowed, strict=True)
        for i, (out, want, allowed) in enumerate(each):
            if allowed is not None:
                within_budget(i, out, want, allowed)
            elif not torch.equal(bits(out), bits(want)):
                message = f"output {i} differs from the reference in its bits"
                raise Unfaithful("wrong bits", message, f"output {i}", out, want)


def fill(held: Any, values: Any) -> None:
    """Write other values into the tensors of a tree."""
    for x, other in zip(tensors(held), tensors(values), strict=True):
        x.copy_(other)


def shape_of(x: Tensor) -> tuple[list[int], torch.dtype]:
    return list(x.shape), x.dtype


class Examples:
    """The examples asked for last: together of at most so many bytes, or one of more."""

    def __init__(self, most: int):
        self.most = most
        self.held: dict[Hashable, Example] = {}  # the latest last

    def get(self, key: Hashable, draw: Callable[[], Example]) -> Example:
        """The example of that name; drawn if it is not held."""
        self.held[key] = latest = self.held.pop(key, None) or draw()
        while len(self.held) > 1 and sum(x.nbytes for x in self.held.values()) > self.most:
            del self.held[next(iter(self.held))]
        return latest


SHARED = Examples(KEPT_BYTES[DEVICE])


def example(op: Op, seed: int, **sizes: Any) -> Example:
    """The example of these sizes and this seed, shared by all that ask for it."""
    return SHARED.get((op, seed, *sizes.items()), lambda: Example(op, arguments(op, seed, **sizes), seed, sizes))


def assert_faithful(
    op: Op, impl: Impl, config: Mapping[str, Any], args: Any, seed: int = 0, layout: Layout = "strided"
) -> None:
    """`Unfaithful` (an AssertionError) unless the implementation, run on guarded copies of args laid out so,

    - returns tensors of the reference's shapes and dtypes, each element within `budget` of the exact value and none
      NaN; for an `exact` op the very bits of the reference;
    - leaves its arguments as the reference leaves them, bit for bit, and the memory around them untouched;
    - writes nothing outside the tensors it allocates, and (interpreted) reads nothing outside them and the arguments.

    `bench.check` and the gates make every other call twice, see `Example.others`.
    """
    Example(op, args, seed).check(impl, config, layout)


def within_budget(i: int, out: Tensor, want: Tensor, allowed: Tensor) -> None:
    """`Unfaithful` if an element of output i is NaN or further from the exact value than allowed."""
    if not out.numel():
        return
    if count := int(out.isnan().sum()):
        message = f"output {i}: {count} of {out.numel()} elements are NaN"
        raise Unfaithful("NaN", message, f"output {i}", out, want, allowed)
    times = excess(out, want, allowed)
    at = tuple(int(j) for j in torch.unravel_index(times.argmax(), times.shape))
    if not times[at] <= 1:
        message = (
            f"output {i}: {int((times > 1).sum())} of {out.numel()} elements are off; the worst, at {at}, "
            f"is {out[at]}, expected {want[at]} ± {allowed[at]:.2e} ({times[at]:.1f} times the budget)"
        )
        raise Unfaithful("beyond budget", message, f"output {i}", out, want, allowed)
