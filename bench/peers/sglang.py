"""SGLang's Triton attention: `extend_attention_fwd` over a cached prefix, `decode_attention_fwd` split along the keys.

    pip install --no-deps sglang==0.5.23

Only the files of the kernels are imported, since the package asks for a whole serving engine. float16 and bfloat16;
cached tokens are listed one by one. Converting the block table to a list of slots, choosing the number of splits and
allocating their partial sums are not timed, since its engine does it once a step for all layers.
"""

from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vila_triton.ops import PagedKV, RaggedBatch, decode_attention, prefill_attention
from vila_triton.registry import Unsupported

from ._cached_conversion import convert_once
from ._import_file import import_single_file
from ._offline import check_plain_attention, check_tensors, fake_gpu
from ._repage import plain_pages

AMD = torch.version.hip is not None
STUBS = {
    "sglang__srt__utils": {
        "is_cuda": lambda: not AMD,
        "is_hip": lambda: AMD,
        "is_gfx95_supported": lambda: False,
        "is_gfx1250_supported": lambda: False,
        "get_device_core_count": lambda device=0: torch.cuda.get_device_properties(device).multi_processor_count,
    }
}
with fake_gpu():
    extend = import_single_file("sglang.kernels.ops.attention.extend_attention", **STUBS)
    decode = import_single_file("sglang.kernels.ops.attention.decode_attention", **STUBS)
    metadata = import_single_file("sglang.kernels.ops.attention.metadata")
MAX_KV_SPLITS = 8  # the most a sequence is cut into: its default `--triton-attention-num-kv-splits`


class KVIndices(NamedTuple):
    """The cache slots of the cached tokens, all sequences end to end."""

    kv_indptr: Tensor  # [b+1] int32
    kv_indices: Tensor  # int64, one a cached token


def build_kv_indices(block_table: Tensor, seq_lens: Tensor, pages: Tensor) -> KVIndices:
    """The slots of the cached tokens. Waits for the device, since their number is known only there."""
    page_size = pages.shape[1]
    offsets = torch.arange(page_size, device=pages.device)
    kv_indices = (block_table.long()[..., None] * page_size + offsets).flatten(1)  # [b, pages · l]
    kv_indptr = F.pad(seq_lens.cumsum(0), (1, 0)).int()
    if pages.is_meta:  # the number is unknown
        return KVIndices(kv_indptr, kv_indices.flatten())
    return KVIndices(kv_indptr, kv_indices[torch.arange(kv_indices.shape[1], device=pages.device) < seq_lens[:, None]])


class SplitBuffers(NamedTuple):
    """The number of KV splits of each sequence, and memory for their results."""

    num_kv_splits: Tensor  # [b] int32
    attn_logits: Tensor  # [b, h, SPLITS, d] float32
    attn_lse: Tensor  # [b, h, SPLITS] float32


def allocate_splits(seq_lens: Tensor, q: Tensor, pages: Tensor) -> SplitBuffers:
    """Errors: Unsupported if a sequence has no token, which the library divides by."""
    if not seq_lens.is_meta and not seq_lens.all():
        raise Unsupported("sglang: a sequence has no cached token")
    (b, h, d), g = q.shape, pages.shape[2]
    num_kv_splits = seq_lens.new_empty(b)
    if not seq_lens.is_meta:
        num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
        metadata.get_num_kv_splits_triton[(1,)](
            num_kv_splits,
            seq_lens.contiguous(),
            b,
            1,
            h,
            g,
            MAX_KV_SPLITS,
            num_sms,
            MAX_NUM_SEQ=max(256, triton.next_power_of_2(b)),
        )
    attn_logits = q.new_empty(b, h, MAX_KV_SPLITS, d, dtype=torch.float32)
    return SplitBuffers(num_kv_splits, attn_logits, attn_logits.new_empty(b, h, MAX_KV_SPLITS))


def max_query_len(query_start_loc: Tensor) -> int:
    """New tokens of the sequence that has most."""
    return 1024 if query_start_loc.is_meta else int(query_start_loc.diff().max())


@prefill_attention.impl("sglang")
def prefill_attention_sglang(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedKV,
    batch: RaggedBatch,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Runs SGLang's kernel on the new tokens q [s, h, d], k and v [s, g, d], and returns [s, h, d].

    Raises Unsupported for calls, pages and dtypes that it does not take.
    """
    check_plain_attention("sglang", numerics, return_lse)
    k_pages, v_pages = plain_pages("sglang", cache)
    check_tensors("sglang", q, k_pages, v_pages)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with fake_gpu(q), patch.object(extend, "CUDA_CAPABILITY", torch.cuda.get_device_capability(), create=True):
        kv_indptr, kv_indices = convert_once(build_kv_indices, cache.block_table, batch.context_lens, k_pages)
        extend.extend_attention_fwd(
            *(x.contiguous() for x in (q, k, v)),
            out,
            *(x.contiguous().flatten(0, 1) for x in (k_pages, v_pages)),  # [p·l, g, d]
            batch.query_start_loc.contiguous(),
            kv_indptr,
            kv_indices,
            custom_mask=None,
            is_causal=True,
            mask_indptr=None,
            max_len_extend=convert_once(max_query_len, batch.query_start_loc),
            k_scale=1.0,
            v_scale=1.0,
            sm_scale=softmax_scale,
        )
    return out


@decode_attention.impl("sglang")
def decode_attention_sglang(
    q: Tensor,
    cache: PagedKV,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Runs SGLang's kernels on one query a sequence, q [b, h, d], and returns [b, h, d].

    Raises Unsupported for calls, pages and dtypes that they do not take, and if a sequence has no cached token.
    """
    check_plain_attention("sglang", numerics, return_lse)
    k_pages, v_pages = plain_pages("sglang", cache)
    check_tensors("sglang", q, k_pages, v_pages)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with fake_gpu(q):
        kv_indptr, kv_indices = convert_once(build_kv_indices, cache.block_table, seq_lens, k_pages)
        num_kv_splits, attn_logits, attn_lse = convert_once(allocate_splits, seq_lens, q, k_pages)
        decode.decode_attention_fwd(
            q.contiguous(),
            *(x.contiguous().flatten(0, 1) for x in (k_pages, v_pages)),  # [p·l, g, d]
            out,
            kv_indptr,
            kv_indices,
            attn_logits,
            attn_lse,
            num_kv_splits,
            MAX_KV_SPLITS,
            softmax_scale,
            k_scale=1.0,
            v_scale=1.0,
        )
    return out
