"""flash-attn 2: CUDA, with a page length that is a multiple of 256.

    pip install --no-deps --no-build-isolation flash-attn      # compiles for long; or a wheel of the project's releases

float16 and bfloat16, heads up to 256 wide, a multiple of 8. What is timed is attention alone: our pages (and, in
prefill, the new tokens) are first copied into pages of 256, since its engines keep them so and write them in a step of
their own, as ours do.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import decode_attention, encoder_attention, prefill_attention
from vila_triton.registry import Unsupported

from ._cached_conversion import prepared
from ._import_file import needs_cuda
from ._offline import check, promises_nothing
from ._paged import whole

flash_attn: Any = import_module("flash_attn")
needs_cuda("flash-attn")
PAGE = 256


def check_heads(q: Tensor, *others: Tensor) -> None:
    check("flash_attn", q, *others, interpreted=False)
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise Unsupported(f"flash_attn: heads are {q.shape[-1]} wide, expected a multiple of 8 up to 256")


class Keys(NamedTuple):
    """All keys and values of a batch in pages of 256, and where those of each sequence would begin without pages."""

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    start: Tensor  # [b+1] int32
    longest: int  # tokens of the sequence that has most


def cached(block_table: Tensor, k_pages: Tensor, v_pages: Tensor, lengths: Tensor, *new: Tensor) -> Keys:
    """new: k, v and query_start, if there are tokens that are not in the pages."""
    made = whole(PAGE, k_pages, v_pages, block_table, lengths, *new)
    start = F.pad(made.lengths.cumsum(0), (1, 0)).to(k_pages.device, torch.int32)
    return Keys(made.k_pages, made.v_pages, made.block_table(), start, int(made.lengths.max()))


def longest(query_start: Tensor) -> int:
    """New tokens of the sequence that has most."""
    return int(query_start.diff().max())


@prefill_attention.impl("flash_attn")
def prefill_attention_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    history: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor:
    promises_nothing("flash_attn", policy, lse)
    check_heads(q, k_pages, v_pages)
    keys = prepared(cached, block_table, k_pages, v_pages, history, k, v, query_start)
    return flash_attn.flash_attn_varlen_func(
        q.contiguous(),
        keys.k_pages,
        keys.v_pages,
        cu_seqlens_q=query_start.contiguous(),
        cu_seqlens_k=keys.start,
        max_seqlen_q=prepared(longest, query_start),
        max_seqlen_k=keys.longest,
        softmax_scale=scale,
        causal=True,
        block_table=keys.block_table,
    )


@decode_attention.impl("flash_attn")
def decode_attention_flash_attn(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor:
    promises_nothing("flash_attn", policy, lse)
    check_heads(q, k_pages, v_pages)
    keys = prepared(cached, block_table, k_pages, v_pages, lengths)
    return flash_attn.flash_attn_with_kvcache(
        q.contiguous()[:, None],  # [b, 1, h, d]
        keys.k_pages,
        keys.v_pages,
        cache_seqlens=lengths.contiguous(),
        block_table=keys.block_table,
        softmax_scale=scale,
    )[:, 0]


@encoder_attention.impl("flash_attn")
def encoder_attention_flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    check_heads(q)
    return flash_attn.flash_attn_func(*(x.contiguous() for x in (q, k, v)), softmax_scale=scale)
