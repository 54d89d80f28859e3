"""The registry: a name belongs to one file, a choice is explicit, what is unsupported fails."""

from collections.abc import Callable

import pytest

from vila_triton.registry import OPS, Op, Unsupported, count_calls, default_choices, op, use


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op of its own, forgotten after the test."""

    def twice(x: int) -> int:
        return 2 * x

    monkeypatch.setitem(OPS, "twice", None)  # what is there before is there after
    made = op(twice)
    made.impl("shifted")(lambda x: x << 1)
    return made


def function_of(file: str, body: str = "return x + x") -> Callable:
    names: dict = {}
    exec(compile(f"def f(x):\n    {body}", file, "exec"), names)
    return names["f"]


def test_only_the_same_file_may_attach_a_name_again(twice: Op) -> None:
    twice.impl("sum")(function_of("/a/one.py", "return 0"))
    twice.impl("sum")(function_of("/a/one.py"))
    with use(twice="sum"):
        assert twice(4) == 8
    with pytest.raises(ValueError, match=r"twice: implementation 'sum' of /b/two.py is already taken by /a/one.py"):
        twice.impl("sum")(function_of("/b/two.py"))
    with pytest.raises(ValueError, match="'reference'"):
        twice.impl("reference")(function_of("/b/two.py"))


def test_unknown_names_are_key_errors_that_list_the_choices(twice: Op) -> None:
    for how in (lambda **choices: use(**choices), lambda **choices: default_choices(choices)):
        for choices, message in (
            ({"thrice": "sum"}, r"no op 'thrice'; there are: .*rms_norm.*twice"),
            ({"twice": "sum"}, r"'twice' has no implementation 'sum'; there are: reference, shifted"),
        ):
            with pytest.raises(KeyError, match=message), how(**choices):
                pass
    assert twice.choose_implementation() == "reference"


def test_use_overrides_default_choices_and_both_end_with_their_block(twice: Op) -> None:
    with count_calls() as calls:
        with default_choices({"twice": "shifted"}):
            with use(twice="reference"), pytest.raises(ZeroDivisionError):
                twice(1)
                raise ZeroDivisionError
            twice(1)
            twice(1)
        twice(1)
    twice(1)  # no longer counted
    assert calls == {("twice", "shifted"): 2, ("twice", "reference"): 2}


def test_an_unsupported_call_fails_without_fallback(twice: Op) -> None:
    def refuse(x: int) -> int:
        raise Unsupported("x is odd")

    twice.impl("even")(refuse)
    with use(twice="even"), count_calls() as calls, pytest.raises(Unsupported, match="x is odd"):
        twice(1)
    assert calls == {("twice", "even"): 1}
