"""A call of an implementation, emulated: a row of counters for each kernel that it launches."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vila_triton.ops import Int4
from vila_triton.registry import OPS, Op, Unsupported

from ...compiler.cross_compile import CompileRequest, CompileResult, resolve_request
from ...measure.cases import Case, random_arguments
from ..launch import emulating
from ..report import KernelFault, Launch
from .sums import (
    WARP_THREADS,
    executed_instructions,
    instructions_by_kind,
    instructions_by_line,
    memory_accesses,
    memory_traffic,
)

TRAFFIC = ("requests", "sectors", "fewest_sectors", "read_bytes", "written_bytes", "accesses", "wavefronts")


@dataclass(frozen=True)
class WorkUnit:
    """The unit that the work of a call is counted in, and how many of it there are.

    "weight" where a matrix of weights is multiplied, "score" for attention (a query with a key), else "element", of the
    first argument.
    """

    name: str
    count: int


def useful_work(op: Op, sizes: Mapping[str, Any], args: Sequence[Any]) -> WorkUnit:
    """Returns the unit of the work of a call with these sizes and arguments."""
    if "attention" in op.name:  # a score is a product of d numbers, and its share of the output another
        return WorkUnit("score", op.cost(**sizes)[0] // (4 * sizes["d"]))
    named = zip(inspect.signature(op.reference).parameters, args)
    matrices = [math.prod(x.shape) for name, x in named if name == "w" or isinstance(x, Int4)]
    return WorkUnit("weight", sum(matrices)) if matrices else WorkUnit("element", args[0].numel())


def emulate_call(request: CompileRequest, checks: bool = True) -> CompileResult[dict[str, Any]]:
    """Runs the kernels of a call, compiled for its target, on random aligned arguments of its sizes, and returns a row
    for each, or the reason why there is none: not supported, or an error, faults of kernels included if `checks` look
    for them.
    """
    config: Mapping[str, Any] = {}
    try:
        impl, config = resolve_request(request)
        args = random_arguments(Case(request.op, "emulate", request.sizes), torch.device("cpu"))
        with emulating(request.target, checks=checks) as report:
            impl(*args, config=config)
        unit = useful_work(OPS[request.op], request.sizes, args)
        flops, nbytes = OPS[request.op].cost(**request.sizes)
        shared = {"unit": unit.name, "units": unit.count, "op_flops": flops, "op_bytes": nbytes}
        return CompileResult(config, [launch_row(launch) | shared for launch in report.launches])
    except Unsupported as reason:
        return CompileResult(config, unsupported=str(reason))
    except KernelFault as error:
        return CompileResult(config, error=f"{error.faults[0]}")
    except Exception as error:
        return CompileResult(config, error=f"{type(error).__name__}: {error}")


def launch_row(launch: Launch) -> dict[str, Any]:
    """Returns the counters of a launch as plain JSON. Instructions are those that warps issued."""
    executed = executed_instructions(launch)
    total = memory_traffic(executed)
    return {
        "kernel": launch.kernel,
        "grid": list(launch.grid),
        "shared": launch.shared_bytes,
        "instructions": sum(x.issued for x in executed),
        "kinds": instructions_by_kind(executed),
        "lines": instructions_by_line(executed),
        "tensor_flops": sum(x.flops for x in executed),
        **{name: getattr(total, name) for name in TRAFFIC},
        "memory": [
            {"source": source, "opcode": opcode, **{name: getattr(x, name) for name in TRAFFIC}}
            for source, opcode, x in memory_accesses(executed)
        ],
    }


def instructions_per_unit(row: Mapping[str, Any]) -> float:
    """Returns the instructions of all threads of a launch for each unit of the call's work."""
    return WARP_THREADS * row["instructions"] / max(1, row["units"])
