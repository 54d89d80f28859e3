"""Compiles every kernel for GPUs that this machine need not have, and checks what the compiler made of it.

    python -m bench.compiled --targets sm_80 gfx942 --dtypes float16 --only int4_matmul-packed-0    one JSON row each

The row of a kernel lists under `wrong` what no kernel may do: fail to compile; spill registers (float32 is there for
comparison only, so there `spills` is a figure and no fault); want more shared memory than a block may have; compute
with less precision than its source asks for, or round differently in an op that is exact
(`bench.compiler.precision`); load weights in narrower pieces than configs/bench/inspect.toml documents. The exit code
is 1 if anything is wrong.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from vila_triton.limits import COUNT
from vila_triton.registry import OPS
from vila_triton.registry.interpreter import uses_triton_kernels

from ._tool import kernels_option, tool
from .compiler.cross_compile import (
    CompileRequest,
    compile_request,
    load_implementations,
    resolve_request,
    run_in_subprocesses,
)
from .compiler.gpus import DEFAULT_TARGETS, TARGETS
from .compiler.kernel_stats import KernelAnalysis, analyze_kernel
from .compiler.precision import find_imprecision
from .compiler.production_sizes import compile_spec
from .compiler.resources import kernel_resources


def serialized_products(analysis: KernelAnalysis) -> list[str]:
    """Returns a sentence if the main loop waits for every `wgmma` before the next begins, as ptxas makes it where it
    does not see that the sums stay in their registers.
    """
    code = [analysis.instructions[i].text for i in analysis.main_loop]
    products, waits = (sum(name in text for text in code) for name in ("HGMMA", "WARPGROUP.DEPBAR"))
    serialized = products > 2 and waits >= products
    return [f"waits {waits} times for {products} wgmma: they are serialized"] if serialized else []


def check_compiled(request: CompileRequest) -> list[dict[str, Any]]:
    """Returns a row for each kernel of a call: its resources, and under `wrong` a sentence for each fault."""

    def analyze(kernel: Any) -> dict[str, Any]:
        analysis = analyze_kernel(kernel) if documented_bytes else None
        width = analysis.stats.loops[0].weight_bytes if analysis else None
        wrong = find_imprecision(kernel.asm, OPS[request.op].bitwise_exact)
        wrong += serialized_products(analysis) if analysis else []
        return {**asdict(kernel_resources(kernel)), "weight_bytes": width, "wrong": wrong}

    target = TARGETS[request.target]
    documented_bytes = None
    if target.triton_target.backend == "cuda":
        documented_bytes = compile_spec(OPS[request.op], request.impl, resolve_request(request)[1]).weight_load_bytes
    result = compile_request(analyze, request)
    if result.error:
        return [{"wrong": [result.error]}]
    for row in result.kernels:
        if row["spills"] and request.sizes["dtype"] != "float32":
            row["wrong"] += [f"spills {row['spills']} and uses {row['registers']} registers"]
        if row["shared"] > target.max_shared_per_block:
            row["wrong"] += [f"wants {row['shared']} bytes of shared memory, there are {target.max_shared_per_block}"]
    if documented_bytes and result.kernels:
        smallest_load = min((row["weight_bytes"] for row in result.kernels if row["weight_bytes"]), default=None)
        if smallest_load is None or smallest_load < documented_bytes:
            loaded = f"{smallest_load} bytes" if smallest_load else "an unknown number of bytes"
            result.kernels[0]["wrong"] += [
                f"a thread loads {loaded} of weights at a time, documented are {documented_bytes}"
            ]
    return result.kernels


def find_requests(
    names: Collection[str], targets: Sequence[str], dtypes: Sequence[str]
) -> dict[tuple[str, str, str], CompileRequest]:
    """Returns the calls of the Triton kernels named op-impl-config, of all if there are no names, at their default
    sizes for each dtype and each target that a config suits: (name, target, dtype) -> request.
    """
    requests = {}
    for op in OPS.values():
        for impl in filter(uses_triton_kernels, op.impls.values()):
            for number, config in enumerate(impl.configs):
                name = f"{op.name}-{impl.name}-{number}"
                if not names or name in names:
                    default_sizes = compile_spec(op, impl.name, config).sizes
                    suited = [target for target in targets if impl.suits(number, target)]
                    for dtype, target in product(dtypes, suited):
                        sizes = {**default_sizes, "dtype": dtype}
                        requests[name, target, dtype] = CompileRequest(op.name, impl.name, number, target, sizes)
    return requests


@tool
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=DEFAULT_TARGETS)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float16", "bfloat16"), default=["float16"])
    parser.add_argument("--only", nargs="*", default=[], help="op-impl-config")
    parser.add_argument("--replace-kernels", metavar="FOLDER", help="take these implementations, not those of kernels/")
    parser.add_argument("--workers", type=COUNT, default=2)
    args = parser.parse_args()
    load_implementations(args.replace_kernels, peers=False)
    requests = find_requests(args.only, args.targets, args.dtypes)
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        results = run_in_subprocesses(check_compiled, list(requests.values()), args.workers, args.replace_kernels)
        for (call, target, dtype), kernels in zip(requests, results):
            for row in kernels:
                print(json.dumps({"call": call, "target": target, "dtype": dtype, **row}))
                wrong |= bool(row["wrong"])
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
