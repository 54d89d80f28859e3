"""Where the tests run: on a CUDA GPU if there is one, else in Triton's interpreter on the CPU.

Profiles, chosen with HYPOTHESIS_PROFILE: `dev` (the default: a few random cases each), `ci` (as many, always the same),
`thorough` (hundreds).
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

OF_KERNELS = (
    "test_kernels",
    "test_properties",
    "test_planted",
    "test_int4_laws",
    "test_int4_issues",
    "test_int4_input",
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
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -m gpu` is everything that says something about a GPU; where there is none, what needs one is skipped."""
    for item in items:
        if torch.cuda.is_available() and item.path.stem in OF_KERNELS:
            item.add_marker("gpu")
        elif not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))


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
