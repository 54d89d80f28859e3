"""The config that runs by default may depend on the architecture, and on a size unless numerics are batch-invariant."""

from typing import Any

import pytest
import triton
from triton import knobs

from bench.compiled import find_requests
from bench.compiled_check import all_cells
from bench.compiler.cross_compile import CrossCompileDriver
from vila_triton.commands.ops import print_ops
from vila_triton.registry import OPS, IntRange, Op, default_choices, op, use
from vila_triton.registry.target_configs import current_target, describe_choice

CONFIGS = [{"times": 2}, {"times": 3}, {"times": 5}, {"times": 7}]


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op of its own, m -> 2 m, whose implementation shows which config it ran."""

    def scaled(m: int) -> int:
        return 2 * m

    monkeypatch.setitem(OPS, "scaled", None)  # what is there before is there after
    made = op(scaled)

    @made.example_inputs
    def _(m: IntRange(1, 99), *, rng: Any, device: str) -> tuple[int]:  # pyright: ignore[reportInvalidTypeForm]
        return (m,)

    made.sizes_from_args("m")(lambda m: {"m": m})
    return made


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes a GPU the target of this process, where no kernel is interpreted."""
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    before = triton.runtime.driver._active
    yield lambda name: triton.runtime.driver.set_active(CrossCompileDriver(name))
    triton.runtime.driver._active = before


def attach(scaled: Op, **by_target: Any) -> None:
    scaled.impl("config", configs=CONFIGS, batch_invariant=True, by_target=by_target)(lambda m, times: times)


def run(m: int) -> Any:
    with use(scaled="config"):
        return OPS["scaled"](m)


def test_a_target_runs_its_own_config_and_others_the_first(scaled: Op, target: Any) -> None:
    attach(scaled, sm_80=1, sm_90=[[8, 2], [64, 1], 3])
    target("sm_80")
    assert current_target() == "sm_80" and [run(m) for m in (1, 99)] == [3, 3]
    target("sm_90")
    assert [run(m) for m in (1, 8, 9, 64, 65, 99)] == [5, 5, 3, 3, 7, 7]
    target("sm_89")
    assert [run(m) for m in (1, 99)] == [2, 2]
    target("gfx942")
    assert current_target() == "gfx942" and run(1) == 2


def test_no_size_matters_under_batch_invariant_numerics(scaled: Op, target: Any) -> None:
    attach(scaled, sm_90=[[8, 2], 3])
    target("sm_90")
    with default_choices({"scaled": "config"}, batch_invariant=True):
        assert {OPS["scaled"](m) for m in range(1, 99)} == {2}
    attach(scaled, sm_90=3)
    with default_choices({"scaled": "config"}, batch_invariant=True):
        assert {OPS["scaled"](m) for m in range(1, 99)} == {7}


def test_interpreted_kernels_run_the_first_config(scaled: Op, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(scaled, sm_90=1)
    target("sm_90")
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert current_target() is None and run(1) == 2


def test_a_tuned_config_wins(scaled: Op, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(scaled, sm_90=1)
    target("sm_90")
    monkeypatch.setattr(scaled.defaults, "config", lambda impl, m: CONFIGS[3] if m > 4 else None)
    assert [run(1), run(5)] == [3, 7]


@pytest.mark.parametrize(
    ("by_target", "message"),
    [
        ({"sm90": 0}, "'sm90' is no target"),
        ({"sm_90": 4}, "sm_90 names config 4, there are 4, from 0"),
        ({"sm_90": [[8, -1], 0]}, "sm_90 names config -1"),
        ({"sm_90": [[8, 1], [8, 2], 0]}, r"the ranges of sm_90 end at \[8, 8\]"),
        ({"sm_90": [8, 1]}, "is none, expected a number or"),
        ({"sm_90": []}, "is none, expected a number or"),
        ({"sm_90": [[8.5, 1], 0]}, r"the ranges of sm_90 end at \[8.5\], expected increasing whole sizes"),
        ({"sm_90": True}, "sm_90 names config True"),
        (3, "3 is none, expected configs by target"),
        ({"sm_90": "1"}, "is none, expected a number or|names config '1'"),
    ],
)
def test_what_is_no_choice_is_refused_where_it_is_attached(scaled: Op, by_target: Any, message: str) -> None:
    with pytest.raises(
        ValueError, match=f"implementation 'config' of .*test_target_configs.py: by_target: .*{message}"
    ):
        scaled.impl("config", configs=CONFIGS, by_target=by_target)(lambda m, times: times)
    scaled.dynamic_sizes = ()
    with pytest.raises(ValueError, match="no size of the op differs from call to call"):
        attach(scaled, sm_90=[[8, 1], 0])


def test_a_config_of_one_target_is_compiled_for_no_other() -> None:
    """Others may not have the memory for it. The first config suits all, as does one that no target names."""
    cells = {(x.op, x.impl, x.number, x.target) for x in all_cells(["sm_80", "sm_90"])}
    requests = {(x.op, x.impl, x.config, x.target) for x in find_requests([], ["sm_80", "sm_90"], ["float16"]).values()}
    assert cells == requests
    for name, made in OPS.items():
        for impl in made.impls.values():
            for number in range(len(impl.configs)):
                named = [x for x in impl.by_target if impl.configs[number] in impl.default_configs(x)]
                for arch in ("sm_80", "sm_90"):
                    expected = number == 0 or not named or arch in named
                    assert impl.suits(number, arch) == expected
                    assert expected or (name, impl.name, number, arch) not in cells


def test_ops_says_which_config_a_target_runs(scaled: Op, capsys: pytest.CaptureFixture[str]) -> None:
    attach(scaled, sm_80=1, sm_90=[[8, 2], 3], sm_86=1)
    import torch

    print_ops(torch.device("cuda"), {})
    expected = "by default: sm_80, sm_86 config 1; sm_90 config 2 for m up to 8, 3 beyond; otherwise config 0"
    assert expected in capsys.readouterr().out
    assert describe_choice(3, "m") == "config 3"


def test_the_configs_of_a_kernel_are_candidates_of_its_search() -> None:
    outside = [
        (made.name, impl.name, number)
        for made in OPS.values()
        for impl in made.impls.values()
        for number, config in enumerate(impl.configs)
        if impl.space and any(config[name] not in values for name, values in impl.space.axes.items())
    ]
    assert not outside
