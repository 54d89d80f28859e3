"""flash-attn 2: CUDA, with a page size that is a multiple of 256.

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

from vila_triton.ops import PagedKV, RaggedBatch, decode_attention, encoder_attention, prefill_attention
from vila_triton.registry import Unsupported

from ._cached_conversion import convert_once
from ._import_file import require_cuda
from ._offline import check_plain_attention, check_tensors
from ._repage import plain_pages, repage

flash_attn: Any = import_module("flash_attn")
require_cuda("flash-attn")
PAGE_SIZE = 256


def check_heads(q: Tensor, *others: Tensor) -> None:
    """Raises Unsupported unless the tensors fit the library and heads are a multiple of 8 wide, up to 256."""
    check_tensors("flash_attn", q, *others, interpreted=False)
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise Unsupported(f"flash_attn: heads are {q.shape[-1]} wide, expected a multiple of 8 up to 256")


class RepagedKV(NamedTuple):
    """All keys and values of a batch in pages of 256, and where those of each sequence would begin without pages."""

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    cu_seqlens: Tensor  # [b+1] int32
    max_seqlen: int  # tokens of the sequence that has most


def repage_for_flash_attn(
    block_table: Tensor, k_pages: Tensor, v_pages: Tensor, seq_lens: Tensor, *new: Tensor
) -> RepagedKV:
    """new: k, v and query_start_loc, if there are tokens that are not in the pages."""
    repaged = repage(PAGE_SIZE, k_pages, v_pages, block_table, seq_lens, *new)
    cu_seqlens = F.pad(repaged.seq_lens.cumsum(0), (1, 0)).to(k_pages.device, torch.int32)
    return RepagedKV(repaged.k_pages, repaged.v_pages, repaged.block_table(), cu_seqlens, int(repaged.seq_lens.max()))


def max_query_len(query_start_loc: Tensor) -> int:
    """New tokens of the sequence that has most."""
    return int(query_start_loc.diff().max())


@prefill_attention.impl("flash_attn")
def prefill_attention_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedKV,
    batch: RaggedBatch,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Runs flash-attn on the new tokens q [s, h, d], k and v [s, g, d], and returns [s, h, d].

    Raises Unsupported for calls, pages, dtypes and heads that it does not take.
    """
    check_plain_attention("flash_attn", numerics, return_lse)
    k_pages, v_pages = plain_pages("flash_attn", cache)
    check_heads(q, k_pages, v_pages)
    tensors = (cache.block_table, k_pages, v_pages, batch.context_lens, k, v, batch.query_start_loc)
    kv = convert_once(repage_for_flash_attn, *tensors)
    return flash_attn.flash_attn_varlen_func(
        q.contiguous(),
        kv.k_pages,
        kv.v_pages,
        cu_seqlens_q=batch.query_start_loc.contiguous(),
        cu_seqlens_k=kv.cu_seqlens,
        max_seqlen_q=convert_once(max_query_len, batch.query_start_loc),
        max_seqlen_k=kv.max_seqlen,
        softmax_scale=softmax_scale,
        causal=True,
        block_table=kv.block_table,
    )


@decode_attention.impl("flash_attn")
def decode_attention_flash_attn(
    q: Tensor,
    cache: PagedKV,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Runs flash-attn on one query a sequence, q [b, h, d], and returns [b, h, d].

    Raises Unsupported for calls, pages, dtypes and heads that it does not take.
    """
    check_plain_attention("flash_attn", numerics, return_lse)
    k_pages, v_pages = plain_pages("flash_attn", cache)
    check_heads(q, k_pages, v_pages)
    kv = convert_once(repage_for_flash_attn, cache.block_table, k_pages, v_pages, seq_lens)
    return flash_attn.flash_attn_with_kvcache(
        q.contiguous()[:, None],  # [b, 1, h, d]
        kv.k_pages,
        kv.v_pages,
        cache_seqlens=seq_lens.contiguous(),
        block_table=kv.block_table,
        softmax_scale=softmax_scale,
    )[:, 0]


@encoder_attention.impl("flash_attn")
def encoder_attention_flash_attn(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Runs flash-attn on images and returns [b, s, h, d], as q is; raises Unsupported for other dtypes and heads."""
    check_heads(q)
    return flash_attn.flash_attn_func(*(x.contiguous() for x in (q, k, v)), softmax_scale=softmax_scale)
