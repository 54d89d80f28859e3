"""exllamav3's Triton attention: over pages in prefill and decode, and over sequences end to end for pictures.

    pip install --no-deps exllamav3==1.6.5

Only the file of the kernels is imported, since the package builds a CUDA extension. float16. It reads our pages and
block table as they are. Prefill takes batches whose sequences have the same number of new tokens; whether they have is
asked once and not timed.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor

from vila_triton.ops import decode_attention, encoder_attention, prefill_attention
from vila_triton.registry import Unsupported

from ._cached_conversion import prepared
from ._import_file import borrow
from ._offline import check, offline, promises_nothing

paged = borrow("exllamav3.modules.attention_fn.triton_paged")


def told(x: Tensor) -> ExitStack:
    """What the library checks and measures on its GPU, left out if x lies on none."""
    stack = ExitStack()
    stack.enter_context(offline(x))
    if not x.is_cuda:
        stack.enter_context(patch.object(paged, "_check_tensor", lambda name, tensor, dtype=None: None))
        stack.enter_context(
            patch.object(paged, "pick_config", lambda device, name, key, candidates, probe: candidates[0])
        )
    return stack


def equal_chunks(query_start: Tensor) -> bool:
    """Whether all sequences have as many new tokens. Waits for the device."""
    return query_start.is_meta or len(query_start.diff().unique()) <= 1


@prefill_attention.impl("exllamav3")
def prefill_attention_exllamav3(
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
    promises_nothing("exllamav3", policy, lse)
    check("exllamav3", q, k_pages, v_pages, dtypes=[torch.float16])
    if not prepared(equal_chunks, query_start):
        raise Unsupported("exllamav3: the sequences have different numbers of new tokens")
    b = len(history)
    new = (x.contiguous().unflatten(0, (b, -1)) for x in (q, k, v))  # [b, s/b, h or g, d]
    queries, keys, values = new
    with told(q):
        out = paged.paged_attn_triton_prefill(
            queries,
            None,
            None,
            *(x.contiguous() for x in (k_pages, v_pages, block_table, history)),
            causal=True,
            softmax_scale=scale,
            k_new=keys,
            v_new=values,
        )
    return out.flatten(0, 1)


@decode_attention.impl("exllamav3")
def decode_attention_exllamav3(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor:
    promises_nothing("exllamav3", policy, lse)
    check("exllamav3", q, k_pages, v_pages, dtypes=[torch.float16])
    with told(q):
        return paged.paged_attn_triton_decode(
            q.contiguous()[:, None],  # [b, 1, h, d]
            None,
            None,
            *(x.contiguous() for x in (k_pages, v_pages, block_table, lengths)),
            softmax_scale=scale,
        )[:, 0]


@encoder_attention.impl("exllamav3")
def encoder_attention_exllamav3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    check("exllamav3", q, k, v, dtypes=[torch.float16])
    with told(q):
        start = prepared(starts, q)
        flat = (x.contiguous().flatten(0, 1) for x in (q, k, v))  # [b·s, h, d]
        return paged.varlen_attn_triton(*flat, start, q.shape[1], softmax_scale=scale).view(q.shape)


def starts(q: Tensor) -> Tensor:
    """Where each picture begins in the positions of all: [b+1] int32."""
    b, s = q.shape[:2]
    return torch.arange(0, (b + 1) * s, s, device=q.device, dtype=torch.int32)
