"""exllamav3's Triton attention: over pages in prefill and decode, and over ragged sequences for images.

    pip install --no-deps exllamav3==1.6.5

Only the file of the kernels is imported, since the package builds a CUDA extension. float16. It reads our pages and
block table as they are. Prefill takes batches whose sequences have the same number of new tokens; this is
checked once and not timed.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor

from vila_triton.ops import PagedKV, RaggedBatch, decode_attention, encoder_attention, prefill_attention
from vila_triton.registry import Unsupported

from ._cached_conversion import convert_once
from ._import_file import import_single_file
from ._offline import check_plain_attention, check_tensors, fake_gpu
from ._repage import plain_pages

paged = import_single_file("exllamav3.modules.attention_fn.triton_paged")


def fake_gpu_checks(x: Tensor) -> ExitStack:
    """Inside, the library neither checks nor measures on its GPU if x is on none."""
    stack = ExitStack()
    stack.enter_context(fake_gpu(x))
    if not x.is_cuda:
        stack.enter_context(patch.object(paged, "_check_tensor", lambda name, tensor, dtype=None: None))
        stack.enter_context(
            patch.object(paged, "pick_config", lambda device, name, key, candidates, probe: candidates[0])
        )
    return stack


def has_equal_chunks(query_start_loc: Tensor) -> bool:
    """True if all sequences have the same number of new tokens. Waits for the device."""
    return query_start_loc.is_meta or len(query_start_loc.diff().unique()) <= 1


@prefill_attention.impl("exllamav3")
def prefill_attention_exllamav3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedKV,
    batch: RaggedBatch,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Runs exllamav3's prefill kernel on the new tokens q [s, h, d], k and v [s, g, d], and returns [s, h, d].

    Raises Unsupported unless all is float16, the pages too, and every sequence has the same number of new tokens.
    """
    check_plain_attention("exllamav3", numerics, return_lse)
    k_pages, v_pages = plain_pages("exllamav3", cache)
    check_tensors("exllamav3", q, k_pages, v_pages, dtypes=[torch.float16])
    if not convert_once(has_equal_chunks, batch.query_start_loc):
        raise Unsupported("exllamav3: the sequences have different numbers of new tokens")
    queries, keys, values = (
        x.contiguous().unflatten(0, (batch.num_seqs, -1)) for x in (q, k, v)
    )  # [b, s/b, h or g, d]
    with fake_gpu_checks(q):
        out = paged.paged_attn_triton_prefill(
            queries,
            None,
            None,
            *(x.contiguous() for x in (k_pages, v_pages, cache.block_table, batch.context_lens)),
            causal=True,
            softmax_scale=softmax_scale,
            k_new=keys,
            v_new=values,
        )
    return out.flatten(0, 1)


@decode_attention.impl("exllamav3")
def decode_attention_exllamav3(
    q: Tensor,
    cache: PagedKV,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Runs exllamav3's decode kernel on one query a sequence, q [b, h, d], and returns [b, h, d].

    Raises Unsupported unless all is float16, the pages too.
    """
    check_plain_attention("exllamav3", numerics, return_lse)
    k_pages, v_pages = plain_pages("exllamav3", cache)
    check_tensors("exllamav3", q, k_pages, v_pages, dtypes=[torch.float16])
    with fake_gpu_checks(q):
        return paged.paged_attn_triton_decode(
            q.contiguous()[:, None],  # [b, 1, h, d]
            None,
            None,
            *(x.contiguous() for x in (k_pages, v_pages, cache.block_table, seq_lens)),
            softmax_scale=softmax_scale,
        )[:, 0]


@encoder_attention.impl("exllamav3")
def encoder_attention_exllamav3(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Runs exllamav3's kernel for ragged sequences on images [b, s, h, d], and returns [b, s, h, d].

    Raises Unsupported unless all is float16.
    """
    check_tensors("exllamav3", q, k, v, dtypes=[torch.float16])
    with fake_gpu_checks(q):
        cu_seqlens = convert_once(image_offsets, q)
        flat = (x.contiguous().flatten(0, 1) for x in (q, k, v))  # [b·s, h, d]
        return paged.varlen_attn_triton(*flat, cu_seqlens, q.shape[1], softmax_scale=softmax_scale).view(q.shape)


def image_offsets(q: Tensor) -> Tensor:
    """Offsets of the images [b, s, h, d] in all their positions, end to end: [b+1] int32."""
    b, s = q.shape[:2]
    return torch.arange(0, (b + 1) * s, s, device=q.device, dtype=torch.int32)
