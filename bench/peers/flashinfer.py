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

from vila_triton.ops import decode_attention, prefill_attention
from vila_triton.registry import Unsupported

from ._cached_conversion import prepared
from ._import_file import needs_cuda
from ._offline import check, promises_nothing
from ._paged import whole

flashinfer: Any = import_module("flashinfer")
needs_cuda("flashinfer")
WORKSPACE = 128 * 2**20  # bytes, as its documentation advises
WIDTHS = (64, 128, 256)
TENSOR_CORE_RATIO = 4  # query heads per key head from which its decode uses tensor cores, as its engines choose


@cache
def workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


class Pages(NamedTuple):
    """The pages of each sequence, all sequences end to end."""

    start: Tensor  # [b+1] int32
    page: Tensor  # int32, one a page
    in_last: Tensor  # [b] int32: tokens in the last page of a sequence


def pages_of(lengths: Tensor, table: Tensor, page_length: int) -> Pages:
    """Errors: Unsupported if a sequence has no token."""
    if not lengths.all():
        raise Unsupported("flashinfer: a sequence has no token")
    counts = (lengths - 1) // page_length + 1
    used = torch.arange(table.shape[1], device=table.device) < counts[:, None]
    return Pages(F.pad(counts.cumsum(0), (1, 0)).int(), table[used], (lengths - 1) % page_length + 1)


def decode_plan(block_table: Tensor, lengths: Tensor, q: Tensor, pages: Tensor, scale: float) -> Any:
    (_, l, g, d), h = pages.shape, q.shape[1]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(q.device), "NHD", use_tensor_cores=h // g >= TENSOR_CORE_RATIO
    )
    held = pages_of(lengths, block_table, l)
    wrapper.plan(*held, h, g, d, l, q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=scale)
    return wrapper


def prefill_plan(
    block_table: Tensor,
    history: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    query_start: Tensor,
    scale: float,
) -> tuple[Any, Tensor, Tensor]:
    """The wrapper, and a copy of the pages in which the new tokens are."""
    (_, l, g, d), h = k_pages.shape, q.shape[1]
    made = whole(l, k_pages, v_pages, block_table, history, k, v, query_start)
    held = pages_of(made.lengths.to(q.device), made.block_table(), l)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(q.device), "NHD")
    wrapper.plan(
        query_start.contiguous(),
        *held,
        h,
        g,
        d,
        l,
        causal=True,
        sm_scale=scale,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return wrapper, made.k_pages, made.v_pages


def check_heads(q: Tensor, *pages: Tensor) -> None:
    check("flashinfer", q, *pages, interpreted=False)
    if q.shape[-1] not in WIDTHS:
        raise Unsupported(f"flashinfer: heads are {q.shape[-1]} wide, supported are {WIDTHS}")


@prefill_attention.impl("flashinfer")
def prefill_attention_flashinfer(
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
    promises_nothing("flashinfer", policy, lse)
    check_heads(q, k_pages, v_pages)
    sources = (block_table, history, q, k, v, k_pages, v_pages, query_start)
    wrapper, *pages = prepared(prefill_plan, *sources, scale=scale)
    return wrapper.run(q.contiguous(), tuple(pages))


@decode_attention.impl("flashinfer")
def decode_attention_flashinfer(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor:
    promises_nothing("flashinfer", policy, lse)
    check_heads(q, k_pages, v_pages)
    wrapper = prepared(decode_plan, block_table, lengths, q, k_pages, scale=scale)
    return wrapper.run(q.contiguous(), (k_pages.contiguous(), v_pages.contiguous()))
