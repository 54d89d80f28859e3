"""These tests run on the stand-in for a GPU: `python -m bench.standin pytest tests/on_standin`."""

from pathlib import Path

import pytest

from bench import standin


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not standin.is_active():
            item.add_marker(pytest.mark.skip(reason="runs on the stand-in for a GPU, in tests/bench/test_standin.py"))
