"""Code that launchers share: the check of their tensors, grids of matrix products, and operands of `tl.dot`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.target_info import cuda_capability_geq

from vila_triton.registry import Unsupported
from vila_triton.registry.search_space import DTYPE_BYTES, Config, LaunchCost, cdiv, next_power_of_2

INTERPRETED = bool(knobs.runtime.interpret)  # read when `@triton.jit` reads it: as the kernels are imported
LOG2_E = math.log2(math.e)
MAX_GRID_YZ = 2**16 - 1  # programs along the second or third axis of a grid
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMPILED = tl.constexpr(not INTERPRETED)


def check_supported(op_name: str, *tensors: Tensor) -> None:
    """Unsupported unless Triton can run on the device of the tensors and load their dtypes."""
    device = tensors[0].device
    if device.type == "cpu" and not INTERPRETED and not compiles_for_cpu():
        raise Unsupported(f"{op_name}: Triton runs on the CPU only interpreted (set TRITON_INTERPRET=1)")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise Unsupported(
            f"{op_name}: tensors are on {device}, but kernels start on cuda:{torch.cuda.current_device()}"
        )
    for x in tensors:
        if x.dtype == torch.bfloat16 and INTERPRETED:
            raise Unsupported(f"{op_name}: Triton's interpreter computes wrong numbers in bfloat16")
        if x.dtype not in DTYPES:
            raise Unsupported(f"{op_name}: {x.dtype} is not one of {', '.join(map(str, DTYPES))}")


def compiles_for_cpu() -> bool:
    """True if Triton's active driver takes tensors of the CPU, as that of an emulated GPU does."""
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # there is no driver
        return False


def rows_and_output(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """x [..., k] as rows [m, k], and an empty output [m, n] in its dtype."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows, torch.empty(len(rows), n, dtype=x.dtype, device=x.device)


def grid(out: Tensor, BLOCK_M: int, BLOCK_N: int) -> tuple[int]:
    """One program for each tile of BLOCK_M x BLOCK_N elements of out [..., m, n]."""
    m, n = out.shape[-2:]
    return (cdiv(m, BLOCK_M) * cdiv(n, BLOCK_N),)


def dot_block(n: int) -> int:
    """The block that covers an axis of n elements and that `tl.dot` accepts: a power of two, 16 at least."""
    return max(16, next_power_of_2(n))


def rows_for_dtype(rows: int, x: Tensor) -> int:
    """The rows of a block of x: those requested, or half as many in float32, which takes twice the shared memory."""
    return max(16, rows * 2 // x.element_size())


def stages_for_dtype(stages: int, x: Tensor) -> int:
    """The stages of a pipeline that loads x: those requested, or half as many in float32 (see `rows_for_dtype`)."""
    return max(1, stages * 2 // x.element_size())


def attention_launch_cost(config: Config, heads: int, rows: int, keys: int, d: int, dtype: str) -> LaunchCost:
    """One launch that takes `rows` rows of each of `heads` heads in blocks of BLOCK_M over `keys` keys each."""
    size, block_n, block_d = DTYPE_BYTES[dtype], config["BLOCK_N"], dot_block(d)
    block_m = max(16, config.get("BLOCK_M", dot_block(rows)) * 2 // size)  # see rows_for_dtype
    padded_keys = block_n * cdiv(keys, block_n)
    return LaunchCost(
        programs=heads * cdiv(rows, block_m),
        bytes=2 * (keys + block_m) * d * size,
        bytes_per_stage=2 * block_n * block_d * size,
        dot_flops=4 * block_m * block_d * padded_keys,
        elementwise_ops=8 * block_m * padded_keys,
    )


@triton.jit
def opaque_copy(x):
    """x, copied by assembly that the compiler does not see through, in registers as wide as its numbers."""
    if x.dtype.primitive_bitwidth == 32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b16 $0, $1;", "=h,h", [x], dtype=x.dtype, is_pure=False, pack=1)


@triton.jit
def ieee_operand(x):
    """x; if it is float32, the compiler for sm_100 does not see what it was made of.

    Triton takes a product there to be TF32, whatever `input_precision` says, if what made one of its operands was
    loaded in fewer than 32 bits.
    """
    if x.dtype == tl.float32 and COMPILED and cuda_capability_geq(10):
        return opaque_copy(x)
    else:
        return x


@triton.jit
def cast_operand(x, dtype: tl.constexpr):
    """x cast to dtype, as an operand of `tl.dot`; see `ieee_operand`."""
    if x.dtype == dtype:
        return x
    else:
        return ieee_operand(x.to(dtype))
