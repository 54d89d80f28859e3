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
pytestmark = pytest.mark.xdist_group("compile")  # what `found` compiles, it compiles once
CALLS = [
    f"{op.name}-{impl.name}-{config}"
    for op in OPS.values()
    for impl in op.impls.values()
    if impl.name != REFERENCE
    for config in range(len(impl.configs))
]
DTYPES = ("float16", "bfloat16")
CHECKED = ("sm_80", "sm_90", "gfx942")  # the others take half as long again: python -m bench.compiled
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, list[dict]]:
    """What the selected tests ask for, compiled in a process of its own: one that interprets kernels compiles none."""
    items: list[Any] = request.session.items
    asked = [item.callspec.params for item in items if "found" in getattr(item, "fixturenames", ())]
    targets, dtypes, calls = (sorted({p[name] for p in asked}) for name in ("target", "dtype", "call"))
    command = [sys.executable, "-m", "bench.compiled"]
    command += ["--targets", *targets, "--dtypes", *dtypes, "--only", *calls]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    out = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True).stdout
    rows = defaultdict(list)
    for line in out.splitlines():
        row = json.loads(line)
        rows[row["call"], row["target"], row["dtype"]].append(row)
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", CHECKED)
@pytest.mark.parametrize("call", CALLS)
def test_compiles(call: str, target: str, dtype: str, found: dict[tuple, list[dict]]) -> None:
    kernels = found[call, target, dtype]
    if not kernels:
        pytest.skip("launches no Triton kernel for these arguments")
    for kernel in kernels:
        assert not kernel["wrong"], kernel
