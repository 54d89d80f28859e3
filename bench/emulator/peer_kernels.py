"""Int4 products of other libraries, emulated and compared with torch: what they call, without this project's registry.

    python -m bench.emulator.peer_kernels                     # all that are installed; bench/peers says how to
    python -m bench.emulator.peer_kernels lmdeploy --target sm_90

lmdeploy turns codes into float16 by inline PTX, which no interpreter runs; GPTQModel chooses blocks and the parts of k
by the number of multiprocessors.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .._tool import tool
from ..peers._import_file import import_single_file
from ..peers._offline import fake_gpu
from . import emulating
from .compile import EMULATED_TARGETS
from .tutorials import error_over_allowed

M, N, K, GROUP = 37, 256, 256, 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns in a word, the lowest bits first (casper-hansen/AutoAWQ)


def pack_awq(codes: Tensor) -> Tensor:
    """Codes [rows, n] below 16 as int32 [rows, n / 8]."""
    columns = codes.view(len(codes), -1, 8).long()  # [rows, n / 8, 8]
    words = sum(columns[..., column] << 4 * place for place, column in enumerate(AWQ_ORDER))
    return torch.as_tensor(words).to(torch.int32)


def lmdeploy(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """x [m, k] times an AWQ weight, by lmdeploy."""
    kernels = import_single_file("lmdeploy.pytorch.kernels.cuda.awq_kernels")
    return kernels.awq_linear(x, qweight, scales, qzeros)


def gptqmodel(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """x [m, k] times an AWQ weight, by GPTQModel."""
    triton_files = "gptqmodel.quantization.awq.modules.triton"
    gemm = import_single_file(f"{triton_files}.gemm")
    scheduler = import_single_file(f"{triton_files}.scheduler")
    dtypes = {"input_dtype": x.dtype, "compute_dtype": x.dtype, "output_dtype": x.dtype}
    plan = scheduler.select_awq_triton_plan(M=len(x), N=N, K=K, group_size=GROUP, device=x.device, **dtypes)
    return gemm.awq_gemm_triton(x, qweight, scales, qzeros, output_dtype=x.dtype, **plan.as_kwargs())


PEERS: Mapping[str, Callable[..., Tensor]] = {"lmdeploy": lmdeploy, "gptqmodel": gptqmodel}


@tool
def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m bench.emulator.peer_kernels", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)} (default: all)")
    parser.add_argument("--target", action="append", choices=EMULATED_TARGETS, help="default: sm_80 and sm_90")
    args = parser.parse_args()
    if unknown := set(args.peers) - PEERS.keys():
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are: {', '.join(PEERS)}")
    torch.manual_seed(0)
    x, scales = torch.randn(M, K).half(), torch.rand(K // GROUP, N).half() / 16
    codes, zeros = torch.randint(16, (K, N)), torch.randint(16, (K // GROUP, N))
    weight = (codes - zeros.repeat_interleave(GROUP, 0)) * scales.repeat_interleave(GROUP, 0)  # [k, n], float16
    wrong = 0
    for target in args.target or ("sm_80", "sm_90"):
        for peer in args.peers or PEERS:
            started = time.perf_counter()
            try:
                with emulating(target) as report, fake_gpu():
                    out = PEERS[peer](x, pack_awq(codes), pack_awq(zeros), scales)
            except ModuleNotFoundError as error:
                if args.peers:
                    raise ValueError(f"{error}; bench/peers/{peer}.py says how to install it") from error
                print(f"{target} {peer:10}  is not here: {error}")
                continue
            error = error_over_allowed(out, x @ weight, x.double() @ weight.double())
            wrong += not error <= 1
            names = ", ".join(sorted({launch.kernel for launch in report.launches}))
            seconds = time.perf_counter() - started
            print(f"{target} {peer:10}  {names}, {seconds:5.1f} s  error over allowed: {error:.2f}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
