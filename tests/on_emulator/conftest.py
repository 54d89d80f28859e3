"""These tests run compiled kernels in the emulator, in a process that interprets none: tests/bench/test_emulator.py
starts it, or

    pytest --confcutdir tests/on_emulator tests/on_emulator

which leaves tests/conftest.py out, by which all other tests interpret kernels.
"""

from pathlib import Path

import pytest
import torch

from bench.correctness.compiled_calls import RUNS_COMPILED

torch.set_num_threads(1)  # tests compute on small tensors, where a second thread costs more than it gives


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not RUNS_COMPILED:
            item.add_marker(pytest.mark.skip(reason="runs compiled kernels, in tests/bench/test_emulator.py"))
