"""FlashInfer's batch attention over pages: CUDA, compiled at the first call of each kind (tens of seconds).

    pip install flashinfer-python==0.7.2.post1      # into a folder of its own: it brings many packages of its own

float16 and bfloat16, heads 64, 128 or 256 wide, at least one cached or new token a sequence. What is timed is `run`;
`plan`, which its engines call once a step for all layers, is not, nor is, in prefill, writing the new tokens to the
pages, a step of its own with them as with us.
"""

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.ops import PagedKV, RaggedBatch, decode_attention, prefill_attention
from vila_triton.registry import Unsupported

from ._cached_conversion import convert_once
from ._import_file import require_cuda
from ._offline import check_plain_attention, check_tensors
from ._repage import plain_pages, repage

flashinfer: Any = import_module("flashinfer")
require_cuda("flashinfer")
WORKSPACE_BYTES = 128 * 2**20  # bytes, as its documentation advises
HEAD_DIMS = (64, 128, 256)
TENSOR_CORE_QUERIES_PER_KV = (
    4  # query heads per key head from which its decode uses tensor cores, as its engines choose
)


@cache
def workspace(device: torch.device) -> Tensor:
    """Returns the library's buffer of `WORKSPACE_BYTES` bytes on a device, allocated once and shared by all calls."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class PageIndices(NamedTuple):
    """The pages of each sequence, all sequences end to end."""

    indptr: Tensor  # [b+1] int32
    indices: Tensor  # int32, one a page
    last_page_len: Tensor  # [b] int32: tokens in the last page of a sequence


def page_indices(seq_lens: Tensor, block_table: Tensor, page_size: int) -> PageIndices:
    """Errors: Unsupported if a sequence has no token."""
    if not seq_lens.all():
        raise Unsupported("flashinfer: a sequence has no token")
    counts = (seq_lens - 1) // page_size + 1
    is_used = torch.arange(block_table.shape[1], device=block_table.device) < counts[:, None]
    return PageIndices(F.pad(counts.cumsum(0), (1, 0)).int(), block_table[is_used], (seq_lens - 1) % page_size + 1)


def plan_decode(block_table: Tensor, seq_lens: Tensor, q: Tensor, pages: Tensor, softmax_scale: float) -> Any:
    """Returns the library's wrapper, planned for decoding; raises Unsupported if a sequence has no token."""
    (_, l, g, d), h = pages.shape, q.shape[1]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(q.device), "NHD", use_tensor_cores=h // g >= TENSOR_CORE_QUERIES_PER_KV
    )
    indices = page_indices(seq_lens, block_table, l)
    wrapper.plan(*indices, h, g, d, l, q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=softmax_scale)
    return wrapper


def plan_prefill(
    block_table: Tensor,
    context_lens: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    query_start_loc: Tensor,
    softmax_scale: float,
) -> tuple[Any, Tensor, Tensor]:
    """The wrapper, and a copy of the pages in which the new tokens are."""
    (_, l, g, d), h = k_pages.shape, q.shape[1]
    repaged = repage(l, k_pages, v_pages, block_table, context_lens, k, v, query_start_loc)
    indices = page_indices(repaged.seq_lens.to(q.device), repaged.block_table(), l)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(q.device), "NHD")
    wrapper.plan(
        query_start_loc.contiguous(),
        *indices,
        h,
        g,
        d,
        l,
        causal=True,
        sm_scale=softmax_scale,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return wrapper, repaged.k_pages, repaged.v_pages


def check_heads(q: Tensor, *pages: Tensor) -> None:
    """Raises Unsupported unless the tensors fit the library and the width of heads is one of `HEAD_DIMS`."""
    check_tensors("flashinfer", q, *pages, interpreted=False)
    if q.shape[-1] not in HEAD_DIMS:
        raise Unsupported(f"flashinfer: heads are {q.shape[-1]} wide, supported are {HEAD_DIMS}")


@prefill_attention.impl("flashinfer")
def prefill_attention_flashinfer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedKV,
    batch: RaggedBatch,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Runs FlashInfer on the new tokens q [s, h, d], k and v [s, g, d], and returns [s, h, d].

    Raises Unsupported for calls, pages, dtypes and heads that it does not take, and if a sequence has no token.
    """
    check_plain_attention("flashinfer", numerics, return_lse)
    k_pages, v_pages = plain_pages("flashinfer", cache)
    check_heads(q, k_pages, v_pages)
    inputs = (cache.block_table, batch.context_lens, q, k, v, k_pages, v_pages, batch.query_start_loc)
    wrapper, *pages = convert_once(plan_prefill, *inputs, softmax_scale=softmax_scale)
    return wrapper.run(q.contiguous(), tuple(pages))


@decode_attention.impl("flashinfer")
def decode_attention_flashinfer(
    q: Tensor,
    cache: PagedKV,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Runs FlashInfer on one query a sequence, q [b, h, d], and returns [b, h, d].

    Raises Unsupported for calls, pages, dtypes and heads that it does not take, and if a sequence has no token.
    """
    check_plain_attention("flashinfer", numerics, return_lse)
    k_pages, v_pages = plain_pages("flashinfer", cache)
    check_heads(q, k_pages, v_pages)
    wrapper = convert_once(plan_decode, cache.block_table, seq_lens, q, k_pages, softmax_scale=softmax_scale)
    return wrapper.run(q.contiguous(), (k_pages.contiguous(), v_pages.contiguous()))
