"""The kernels of Triton's tutorials 01 to 06, emulated and compared with torch.

    python -m bench.emulator.tutorials FOLDER                    # python/tutorials of a clone of Triton
    python -m bench.emulator.tutorials FOLDER --target sm_90 --only 03

Of a tutorial's file only imports, functions and lists of configs are run; sizes, arguments and launches are
those of this file. A result may be twice as far from the one in float64 as torch's own, plus one rounding. Tutorial 06
copies with tensor descriptors on sm_90, which is not emulated.
"""

import argparse
import ast
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .._tool import tool
from . import emulating

CONFIG_NAMES = {"DEVICE", "NUM_STAGES_OPTIONS", "configs"}  # what kernels' decorators ask for
Outputs = dict[str, tuple[Tensor, Tensor, Tensor]]  # name -> the kernel's, torch's, and the one in float64
Launch = Callable[[Any], Outputs]  # of the kernels of a module


def load_definitions(file: Path) -> SimpleNamespace:
    """The names that a tutorial defines, without what it runs."""
    names: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    for node in ast.parse(file.read_text()).body:
        if is_definition(node):
            # what only their benchmarks import may be missing
            with suppress(ModuleNotFoundError):
                exec(compile(ast.Module([node], []), str(file), "exec"), names)
    return SimpleNamespace(**names)


def is_definition(node: ast.stmt) -> bool:
    """True for imports, functions that are no tests, and what decorators ask for."""
    if isinstance(node, ast.If | ast.Assign):
        stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return bool(stored & CONFIG_NAMES)
    if isinstance(node, ast.FunctionDef):
        return not node.name.startswith(("test", "bench"))
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Try)


def vector_add(module: Any) -> Outputs:
    """Three blocks of 1024, of which the last is cut off."""
    x, y = torch.randn(2, 3001)
    out = torch.empty_like(x)
    module.add_kernel[lambda meta: (triton.cdiv(3001, meta["BLOCK_SIZE"]),)](x, y, out, 3001, BLOCK_SIZE=1024)
    return {"sum": (out, x + y, x.double() + y.double())}


def softmax(module: Any) -> Outputs:
    """Eight programs over 37 rows, pipelined."""
    x = torch.randn(37, 781)
    out = torch.empty_like(x)
    module.softmax_kernel[(8,)](
        out, x, x.stride(0), out.stride(0), *x.shape, BLOCK_SIZE=1024, num_stages=4, num_warps=8
    )  # fmt: skip
    return {"softmax": (out, x.softmax(1), x.double().softmax(1))}


def matmul(module: Any) -> Outputs:
    """With its first config, 128 x 256 x 64 with 8 warps: on sm_90 that is `wgmma`."""

    def grid(meta: Mapping[str, Any]) -> tuple[Any]:
        return (triton.cdiv(150, meta["BLOCK_SIZE_M"]) * triton.cdiv(300, meta["BLOCK_SIZE_N"]),)

    a, b = torch.randn(150, 200).half(), torch.randn(200, 300).half()
    outputs: Outputs = {}
    for activation in ("", "leaky_relu"):
        out = torch.empty(150, 300, dtype=torch.float16)
        sizes_and_strides = *(150, 300, 200), *a.stride(), *b.stride(), *out.stride()
        module.matmul_kernel[grid](a, b, out, *sizes_and_strides, ACTIVATION=activation)
        apply: Callable[[Tensor], Tensor] = F.leaky_relu if activation else lambda x: x
        outputs[f"product {activation}".strip()] = out, apply(a @ b), apply(a.double() @ b.double())
    return outputs


def dropout(module: Any) -> Outputs:
    """With a mask, and with random numbers of the kernel's own."""
    x, p = torch.randn(3001), 0.25
    keep = (torch.rand(3001) > p).int()
    out, seeded = torch.empty_like(x), torch.empty_like(x)
    module._dropout[(3,)](x, keep, out, 3001, p, BLOCK_SIZE=1024)
    module._seeded_dropout[(3,)](x, seeded, 3001, p, 123, BLOCK_SIZE=1024)
    kept = uniform(123, 3001) > p
    return {
        "dropout": (out, x / (1 - p) * keep, x.double() / (1 - p) * keep),
        "seeded dropout": (seeded, x / (1 - p) * kept, x.double() / (1 - p) * kept),
    }


def uniform(seed: int, n: int) -> Tensor:
    """The numbers of `tl.rand(seed, range(n))`, by Philox-4x32-10 (Salmon et al., "Parallel random numbers", 2011).

    Of its first word as a signed number, the 31 bits of the absolute value become a float32 below 1.
    """
    low_bits = 2**32 - 1
    counter = [torch.arange(n), *torch.zeros(3, n, dtype=torch.int64)]
    keys = [seed & low_bits, seed >> 32]
    for _ in range(10):
        high = [wide_product(counter[0], 0xD2511F53), wide_product(counter[2], 0xCD9E8D57)]
        counter = [
            high[1][0] ^ counter[1] ^ keys[0],
            high[1][1],
            high[0][0] ^ counter[3] ^ keys[1],
            high[0][1],
        ]
        keys = [(keys[0] + 0x9E3779B9) & low_bits, (keys[1] + 0xBB67AE85) & low_bits]
    signed = counter[0].to(torch.int32)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10


def wide_product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of the product of x, 32 bits in int64, with a factor of 32 bits."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def layer_norm(module: Any) -> Outputs:
    """More rows than there are locks, so that programs wait for each other."""
    m, n, group_size = 12, 300, 4
    x, weight, bias, grad = torch.randn(m, n), torch.rand(n), torch.rand(n), torch.randn(m, n)
    y, dx, mean, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(m), torch.empty(m)
    dw, db, locks = torch.empty(n), torch.empty(n), torch.zeros(2 * group_size, dtype=torch.int32)
    dw_parts, db_parts = torch.zeros(2, group_size, n)
    module._layer_norm_fwd_fused[(m,)](x, y, weight, bias, mean, rstd, n, n, 1e-5, BLOCK_SIZE=512, num_warps=2)
    module._layer_norm_bwd_dx_fused[(m,)](
        dx, grad, dw_parts, db_parts, x, weight, mean, rstd, locks, n, n,
        GROUP_SIZE_M=group_size, BLOCK_SIZE_N=512, num_warps=2,
    )  # fmt: skip
    module._layer_norm_bwd_dwdb[(triton.cdiv(n, 128),)](
        dw_parts, db_parts, dw, db, group_size, n, BLOCK_SIZE_M=32, BLOCK_SIZE_N=128
    )

    def by_torch(dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        out = F.layer_norm(inputs[0], (n,), inputs[1], inputs[2], 1e-5)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    results = zip((y, dx, dw, db), by_torch(torch.float32), by_torch(torch.float64), strict=True)
    return dict(zip(("layer norm", "gradient of x", "of the weight", "of the bias"), results, strict=True))


def attention(module: Any) -> Outputs:
    """Causal, two heads of 128 tokens, forwards and backwards, blocks of 64 x 32 forwards."""
    z, h, n, d, scale = 1, 2, 128, 64, 0.5
    q, k, v, grad = torch.randn(4, z, h, n, d).mul(0.5).half()
    out, dq, dk, dv = (torch.empty_like(q) for _ in range(4))
    log_sums, delta = torch.empty(2, z, h, n)
    forwards = {"HEAD_DIM": d, "FP8_OUTPUT": False, "STAGE": 3, "warp_specialize": False, "IS_HOPPER": False}
    takes = {name: value for name, value in forwards.items() if name in module._attn_fwd.arg_names}
    module._attn_fwd[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]), z * h)](
        scale, log_sums, z, h, q, k, v, out, N_CTX=n, **takes
    )
    module._attn_bwd_preprocess[(1, z * h)](out, grad, delta, z, h, n, BLOCK_M=n, HEAD_DIM=d)
    scaled_k = k * (scale * 1.4426950408889634)  # powers of 2, not of e
    module._attn_bwd[(1, 1, z * h)](
        q, scaled_k, v, scale, grad, dq, dk, dv, log_sums, delta, *q.stride(), h, n,
        BLOCK_M1=32, BLOCK_N1=128, BLOCK_M2=128, BLOCK_N2=32, BLK_SLICE_FACTOR=2, HEAD_DIM=d, CAUSAL=True,
        num_warps=4, num_stages=5,
    )  # fmt: skip

    def by_torch(dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        scores = inputs[0] @ inputs[1].mT * scale + torch.full((n, n), -torch.inf, dtype=dtype).triu(1)
        out = scores.softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype) @ inputs[2]
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    results = zip((out, dq, dk, dv), by_torch(torch.float16), by_torch(torch.float64), strict=True)
    return dict(zip(("attention", "gradient of q", "of k", "of v"), results, strict=True))


LAUNCHES: Mapping[str, Launch] = {
    "01-vector-add": vector_add,
    "02-fused-softmax": softmax,
    "03-matrix-multiplication": matmul,
    "04-low-memory-dropout": dropout,
    "05-layer-norm": layer_norm,
    "06-fused-attention": attention,
}


def error_over_allowed(actual: Tensor, by_torch: Tensor, exact: Tensor) -> float:
    """The largest error of a result over twice torch's largest plus one rounding of the largest value."""
    own = float((by_torch.double() - exact).abs().max())
    allowed = 2 * own + torch.finfo(actual.dtype).eps / 2 * float(exact.abs().max())
    return float((actual.double() - exact).abs().max()) / allowed


@tool
def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m bench.emulator.tutorials", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--target", action="append", help="default: sm_80 and sm_90")
    parser.add_argument("--only", default="", metavar="BEGINNING", help="of the names of the tutorials to run")
    args = parser.parse_args()
    wrong = 0
    for target in args.target or ("sm_80", "sm_90"):
        for name, launch in LAUNCHES.items():
            if not name.startswith(args.only) or (name.startswith("06") and target != "sm_80"):
                continue
            started = time.perf_counter()
            torch.manual_seed(0)
            capability = Mock(return_value=(int(target[3:-1]), int(target[-1])))
            with emulating(target) as report, patch.object(torch.cuda, "get_device_capability", capability):
                outputs = launch(load_definitions(args.folder / f"{name}.py"))
            seconds = time.perf_counter() - started
            errors = {output: error_over_allowed(*results) for output, results in outputs.items()}
            wrong += not max(errors.values()) <= 1
            shares = ", ".join(f"{output} {share:.2f}" for output, share in errors.items())
            print(
                f"{target} {name:24}  {len(report.launches)} launches, {seconds:5.1f} s  error over allowed: {shares}",
                flush=True,
            )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
