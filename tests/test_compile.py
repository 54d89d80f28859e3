"""Every config of every Triton implementation compiles for GPUs that need not be here, spills nothing, fits them,
and loads 4-bit weights as wide as its file says: `bench.compiled`."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from vila_triton.registry import OPS, REFERENCE, discover

discover()
CALLS = [
    f"{op.name}-{impl.name}-{config}"
    for op in OPS.values()
    for impl in op.impls.values()
    if impl.name != REFERENCE
    for config in range(len(impl.configs))
]
# What else there is takes as long again: python -m bench.compiled
CHECKED = [("sm_80", "bfloat16"), ("sm_90", "float16"), ("gfx942", "float16")]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, list[dict]]:
    """What the selected tests ask for, compiled in a process of its own: one that interprets kernels compiles none."""
    items: list[Any] = request.session.items
    asked = [item.callspec.params for item in items if "found" in getattr(item, "fixturenames", ())]
    pairs, calls = sorted({(p["target"], p["dtype"]) for p in asked}), sorted({p["call"] for p in asked})
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    rows = defaultdict(list)
    for target, dtype in pairs:
        command = [sys.executable, "-m", "bench.compiled", "--targets", target, "--dtypes", dtype, "--only", *calls]
        out = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True).stdout
        for row in map(json.loads, out.splitlines()):
            rows[row["call"], target, dtype].append(row)
    return rows


@pytest.mark.parametrize("target, dtype", CHECKED)
@pytest.mark.parametrize("call", CALLS)
def test_compiles(call: str, target: str, dtype: str, found: dict[tuple, list[dict]]) -> None:
    kernels = found[call, target, dtype]
    if not kernels:
        pytest.skip("launches no Triton kernel for these arguments")
    for kernel in kernels:
        assert not kernel["wrong"], kernel
