"""Kernel files with one line changed, found as any file of kernels/ is, and forgotten after the test."""

import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vila_triton import kernels
from vila_triton.registry import OPS, discover

ORIGIN = {"int4_matmul": "packed"}  # the variant whose file is changed, where it is not "triton"
Plant = Callable[..., None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """plant(op, name, old, new): a kernel of the op as variant `name` with `old` made `new`; again: another version."""
    discover()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    before = {op: dict(OPS[op].impls) for op in OPS}

    def write(op: str, name: str, old: str = "", new: str = "") -> None:
        origin = OPS[op].impls[ORIGIN.get(op, "triton")]
        text, registers = origin.file.read_text(), f'impl("{origin.name}"'
        assert old in text and registers in text
        file = tmp_path / f"{op}_{name}.py"
        file.write_text(text.replace(old, new, 1).replace(registers, f'impl("{name}"'))
        linecache.clearcache()
        importlib.invalidate_caches()
        module = f"{kernels.__name__}.{file.stem}"
        if module in sys.modules:
            importlib.reload(sys.modules[module])

    yield write
    files = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
    for name in [name for name, file in files.items() if file.startswith(str(tmp_path))]:
        del sys.modules[name]
    for op, impls in before.items():
        OPS[op].impls.clear()
        OPS[op].impls.update(impls)
