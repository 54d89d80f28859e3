"""Packings of 4-bit codes in AWQ checkpoints: AutoAWQ's "gemm" and "gemv", and llm-awq's v2.

Each pair of functions goes between codes [n, k] (0 to 15; any integer dtype in, int32 out; n outputs, k inputs) and a
packed tensor. A packing is a permutation: every code comes back bit for bit. The native packing is in `ops.int4_tiles`.
"""

import torch
from einops import rearrange
from torch import Tensor

from vila_triton.ops.int4_tiles import CODES_PER_WORD, pack_nibbles, unpack_nibbles

AWQ_GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code is nibble i of a word


def pack_awq_gemv(codes: Tensor) -> Tensor:
    """AutoAWQ "gemv", llm-awq v1: codes [n, k] -> [n, k/8] int32, eight codes of a row in order."""
    return pack_nibbles(rearrange(codes, "n (c i) -> n c i", i=CODES_PER_WORD))


def unpack_awq_gemv(packed: Tensor) -> Tensor:
    """The inverse of `pack_awq_gemv`: [n, k/8] int32 -> codes [n, k] int32."""
    return unpack_nibbles(packed).flatten(-2)


def pack_awq_gemm(codes: Tensor) -> Tensor:
    """AutoAWQ "gemm": codes [n, k] -> [k, n/8] int32, eight outputs of an input, the even ones before the odd ones."""
    return pack_nibbles(rearrange(codes, "(c i) k -> k c i", i=CODES_PER_WORD)[..., list(AWQ_GEMM_ORDER)])


def unpack_awq_gemm(packed: Tensor) -> Tensor:
    """The inverse of `pack_awq_gemm`: [k, n/8] int32 -> codes [n, k] int32."""
    inverse_order = torch.tensor(AWQ_GEMM_ORDER, device=packed.device).argsort()
    return rearrange(unpack_nibbles(packed)[..., inverse_order], "k c i -> (c i) k")


def pack_awq_v2(codes: Tensor) -> Tensor:
    """llm-awq v2: codes [n, k] -> [n/4, k] int16. Four outputs and 64 inputs share 64 halfwords.

    Input 32 b + 8 s + e of output i (b = 0, 1; s = 0..3; e = 0..7) is nibble s of halfword 16 i + 8 b + e.
    """
    nibbles = rearrange(codes.int(), "(n i) (k b s e) -> n (k i b e) s", i=4, b=2, s=4, e=8)
    shifts = torch.arange(0, 16, 4, device=codes.device, dtype=torch.int32)
    return (nibbles << shifts).sum(-1).to(torch.uint16).view(torch.int16)


def unpack_awq_v2(packed: Tensor) -> Tensor:
    """The inverse of `pack_awq_v2`: [n/4, k] int16 -> codes [n, k] int32."""
    shifts = torch.arange(0, 16, 4, device=packed.device, dtype=torch.int32)
    nibbles = (packed.int()[..., None] >> shifts) & 0xF  # [n/4, k, 4]
    return rearrange(nibbles, "n (k i b e) s -> (n i) (k b s e)", i=4, b=2, e=8)


def padded_scale_rows(k: int, group_size: int) -> int:
    """The number of rows of scales and zeros that llm-awq (v1 and v2) stores; the first k / group_size are real, the
    others 0.

    Errors: ValueError for a group size other than 32, 64 or a multiple of 128.
    """
    multiple = {32: 4, 64: 2}.get(group_size, 1 if group_size % 128 == 0 else 0)
    if not multiple:
        raise ValueError(f"llm-awq has no groups of {group_size}: they are 32, 64 or a multiple of 128")
    words = -(-(k // group_size) // CODES_PER_WORD)
    return CODES_PER_WORD * (-(-words // multiple) * multiple)
