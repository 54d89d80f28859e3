"""An op remembers of its calls one decision for a signature, for as long as it holds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vila_triton.registry import OPS, IntRange, Op, Unsupported, default_choices, op, use
from vila_triton.registry.signature import call_signature


@dataclass(frozen=True)
class Pair:
    """Two parts of an argument."""

    x: Tensor
    scale: float


@pytest.fixture
def scaled() -> Iterator[Op]:
    """An op that counts its checks in `checked`."""

    @op
    def scaled(x: Any, pair: Any, factor: Any) -> Tensor:
        return x * pair.scale * factor

    checked: list[tuple[Any, ...]] = []

    @scaled.requires
    def _(x: Any, pair: Any, factor: Any) -> None:
        checked.append(tuple(x.shape))
        if x.dtype != torch.float32:
            raise ValueError(f"scaled: x is {x.dtype}")

    @scaled.example_inputs
    def _(n: IntRange(1, 4), *, rng: torch.Generator, device: str) -> tuple[Any, ...]:  # pyright: ignore
        return torch.zeros(n), Pair(torch.zeros(n), 1.0), 2

    @scaled.sizes_from_args("n")
    def _(x: Any, pair: Any, factor: Any) -> dict[str, Any]:
        return {"n": len(x)}

    @scaled.impl("fast", configs=[{"by": 1}, {"by": 2}])
    def _(x: Any, pair: Any, factor: Any, *, by: int) -> Tensor:
        if factor == 7:
            raise Unsupported("scaled: 7")
        return x * pair.scale * factor * by

    scaled.checked = checked  # pyright: ignore[reportAttributeAccessIssue]
    yield scaled
    del OPS["scaled"]


def signature(*args: Any, **kwargs: Any) -> Any:
    """The signature of a call, without its tensors; None if it has none."""
    found = call_signature(args, kwargs)
    return found and found[0]


def call(op: Op, n: int = 2, scale: float = 1.0, factor: Any = 2, **changes: Any) -> list[float]:
    x = torch.ones(n, **changes)
    return op(x, Pair(x, scale), factor).tolist()


def test_equal_signatures_are_checked_once(scaled: Any) -> None:
    with use(scaled="fast"):
        assert [call(scaled), call(scaled), call(scaled, 3), call(scaled)] == [[2, 2], [2, 2], [2, 2, 2], [2, 2]]
    assert scaled.checked == [(2,), (3,)]


@pytest.mark.parametrize("change", [{"scale": 3.0}, {"factor": 2.0}, {"factor": True}, {"factor": 1}])
def test_other_numbers_and_types_are_checked(scaled: Any, change: dict[str, Any]) -> None:
    with use(scaled="fast"):
        call(scaled)
        call(scaled, **change)
    assert len(scaled.checked) == 2


def test_a_refused_call_is_refused_again(scaled: Any) -> None:
    with use(scaled="fast"):
        for _ in range(2):
            with pytest.raises(ValueError, match="x is torch"):
                call(scaled, dtype=torch.float64)
            with pytest.raises(Unsupported, match="scaled: 7"):
                call(scaled, factor=7)


def test_a_choice_a_config_and_an_implementation_that_change_count_at_once(scaled: Any) -> None:
    with use(scaled="fast"):
        assert call(scaled) == [2, 2]
        with use(scaled="reference"):
            assert call(scaled, scale=5.0) == [10, 10] and call(scaled) == [2, 2]
        scaled.impls["fast"] = replace(scaled.impls["fast"], configs=[{"by": 10}])
        assert call(scaled) == [20, 20]
    with default_choices({"scaled": "fast"}):
        assert call(scaled) == [20, 20]
    with default_choices({}):
        assert call(scaled) == [2, 2]


def test_a_tuned_table_that_changes_counts_at_once(scaled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [{"by": 3}, {"by": 4}]
    monkeypatch.setattr(scaled.defaults, "table", lambda *args, **kwargs: tables[0], raising=False)
    monkeypatch.setattr(scaled.defaults, "config", lambda *args, **kwargs: tables[0], raising=False)
    with use(scaled="fast"):
        assert call(scaled) == [6, 6]
        del tables[0]
        assert call(scaled) == [8, 8]


def test_signatures_tell_calls_apart_and_take_no_traced_tensor() -> None:
    x = torch.zeros(2, 3)
    calls: list[tuple[Any, ...]] = [
        (x,),
        (x.T,),
        (x.half(),),
        (x.to("meta"),),
        (torch.zeros(7)[1:].view(2, 3),),
        (x, None),
        (x, 1),
        (x, 1.0),
        (x, True),
        (x, "1"),
        (Pair(x, 1.0),),
        (Pair(x, 2.0),),
        (Pair(x.T, 1.0),),
        (x, x),
    ]
    signatures = [signature(*args) for args in calls]
    assert len(set(signatures)) == len(calls) and None not in signatures
    assert signature(x=x) != signature(y=x)
    assert signature(torch.zeros(2, 3)) == signatures[0]
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert signature(torch.zeros(2, 3)) is None
    assert signature([x]) is None
