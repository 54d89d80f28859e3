"""Where the tests run: on a CUDA GPU if there is one, else in Triton's interpreter on the CPU.

Profiles, chosen with HYPOTHESIS_PROFILE: `dev` (the default: a few random cases each), `ci` (as many, always the same),
`thorough` (hundreds), `compiled` (the default on a GPU, where nearly every case compiles a kernel: two, always the
same), `standin` (one, on the stand-in for a GPU, which looks at what calls do and not at their numbers).
"""

import os
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel


from far_memory import far  # noqa: F401 (a fixture)

from vila_triton.registry import Unsupported

LONGEST = (  # begin first, in this order, so that no process is left with one at the end
    *(
        "test_every_kernel_compiles",
        "test_emulator",
        "test_standin",
        "test_every_kernel",
        "test_metamorphic",
        "test_bench_tune",
    ),
    *("test_int4_regressions", "test_rounding", "test_repository_rules", "test_bench_plot", "test_quantize"),
)
torch.set_num_threads(1)  # tests compute on small tensors, where a second thread costs more than it gives
_common = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
settings.register_profile("dev", _common, max_examples=6)
settings.register_profile("ci", _common, max_examples=6, derandomize=True)
settings.register_profile("thorough", _common, max_examples=300)
settings.register_profile("compiled", _common, max_examples=2, derandomize=True)
settings.register_profile("standin", _common, max_examples=1, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "compiled" if torch.cuda.is_available() else "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -m gpu` selects what says most about a GPU in two minutes of it; all tests run there without -m.

    Selected are the tests that need a GPU, which are marked `gpu` and skipped where there is none; and of the tests
    marked `on_gpu`, which run interpreted too, those with the first config of an implementation, or with none.
    """
    order = {stem: i for i, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if not torch.cuda.is_available():
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))
        elif item.get_closest_marker("on_gpu") and has_first_config(item):
            item.add_marker("gpu")


def has_first_config(item: pytest.Item) -> bool:
    """Return True if its parameter `config` is absent, 0, or the first config of its parameter `impl`."""
    parameters: Any = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    config = parameters.get("config", 0)
    return config == 0 if isinstance(config, int) else config is parameters["impl"].configs[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """On a GPU, a test of an implementation over a library's product for CPUs is skipped, as that says itself."""
    try:
        return (yield)
    except Unsupported as reason:
        if not torch.cuda.is_available() or "for CPUs" not in str(reason):
            raise
        pytest.skip(str(reason))


@pytest.fixture
def dots_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted products add up in the order of k for every element, as tensor cores do; numpy's BLAS, on some CPUs,
    goes by where in the matrix an element lies.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        x, y, total = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype), d.data.copy()
        for i in range(x.shape[-1]):
            total += x[..., :, i, None] * y[..., i, None, :]
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _nothing_is_kept_between_tests(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`check` goes on with other examples after an earlier run; here every run is the first."""
    if (module := sys.modules.get("bench.correctness.kept_coverage")) is not None:
        monkeypatch.setattr(module, "FOLDER", tmp_path_factory.mktemp("check"))
