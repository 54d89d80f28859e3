"""Every config of every Triton implementation compiles for GPUs that need not be here, spills nothing, fits them,
computes in the precision it is asked for, and loads 4-bit weights as wide as its file says: `bench.compiled`."""

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.compiled import check_compiled, find_requests
from bench.compiler.cross_compile import run_in_subprocesses
from bench.compiler.gpus import TARGETS
from vila_triton.registry import OPS, REFERENCE, discover

discover()
CALLS = [
    f"{op.name}-{impl.name}-{config}"
    for op in OPS.values()
    for impl in op.impls.values()
    if impl.name != REFERENCE
    for config in range(len(impl.configs))
]
CHECKED = {("sm_80", "bfloat16"), ("sm_90", "float16"), ("gfx942", "float16")}
DTYPES = ("float32", "float16", "bfloat16")
FLOAT32 = ("int4_matmul-splitk-0", "sm_100", "float32")  # of this Triton's compiler is tempted to make TF32
CASES = [(call, target, dtype) for target in TARGETS for dtype in DTYPES for call in CALLS]
QUICK = [x for x in CASES if x[1:] in CHECKED or x == FLOAT32]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, list[dict]]:
    """Compile the calls of the selected tests in another process: one that interprets kernels compiles none."""
    items: list[Any] = request.session.items
    params = [item.callspec.params for item in items if "found" in getattr(item, "fixturenames", ())]
    requests = find_requests([], list(TARGETS), DTYPES)
    asked = [key for p in params if (key := (p["call"], p["target"], p["dtype"])) in requests]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return dict(zip(asked, run_in_subprocesses(check_compiled, [requests[key] for key in asked], 1)))


@pytest.mark.parametrize(
    "call, target, dtype", [pytest.param(*x, marks=() if x in QUICK else pytest.mark.slow) for x in CASES]
)
def test_compiles(call: str, target: str, dtype: str, found: dict[tuple, list[dict]]) -> None:
    kernels = found.get((call, target, dtype))
    if not kernels:
        pytest.skip("launches no Triton kernel for these arguments")
    for kernel in kernels:
        assert not kernel["wrong"], kernel


MIXED = """
    import torch
    from triton.runtime.jit import JITFunction
    from bench.compiler.cross_compile import intercept_launches, load_implementations
    from bench.compiler.precision import find_imprecision
    from vila_triton.registry import OPS

    load_implementations(None, peers=False)
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        print(kernel.__name__, *find_imprecision(run(kernel, *args, grid=grid, warmup=True, **kwargs).asm))

    op = OPS["prefill_attention"]
    sizes = dict(b=1, s=128, t=128, g=1, ratio=1, d=64, l=16, dtype="float32", numerics="fast")
    args = op.make_example(**sizes, kv="plain", rng=torch.Generator(), device="meta")
    pages = (args[3].half(), args[4].half())
    quantised = [op.make_example(**sizes, kv=kv, rng=torch.Generator(), device="meta")[3:5] for kv in ("int8", "int4")]
    with intercept_launches("sm_100", compile_only):
        op.impls["simple"](*args[:3], *pages, *args[5:], config=op.impls["simple"].configs[0])
        for pools in (pages, *quantised):
            op.impls["triton"](*args[:3], *pools, *args[5:], config=op.impls["triton"].configs[0])
"""


@pytest.mark.slow
def test_float32_queries_over_pages_of_fewer_bits_stay_float32() -> None:
    """Triton takes a product for sm_100 to be TF32 if an operand was loaded in fewer than 32 bits."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = textwrap.dedent(MIXED)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["_prefill_simple_kernel", *["_prefill_attention_kernel"] * 3]


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """The Triton functions of kernels/, with the names of their files."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
                yield path.name, node


def test_no_triton_function_returns_none() -> None:
    """Triton 3.6 compiles neither `return None` nor None in a tuple that is returned; what may be missing is ()."""

    def has_none(value: ast.expr | None) -> bool:
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        return any(isinstance(x, ast.Constant) and x.value is None for x in parts)

    returned = [(file, fn.name, node) for file, fn in functions() for node in ast.walk(fn) if type(node) is ast.Return]
    assert returned and not [(file, name) for file, name, node in returned if has_none(node.value)]


def test_every_product_asks_for_the_precision_of_its_operands() -> None:
    """Without a word Triton rounds float32 to TF32."""
    calls = [(file, x) for file, fn in functions() for x in ast.walk(fn) if isinstance(x, ast.Call)]
    products = [(file, ast.unparse(call)) for file, call in calls if ast.unparse(call.func) == "tl.dot"]
    assert products and not [x for x in products if "input_precision='ieee'" not in x[1]]
