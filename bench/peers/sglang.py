"""SGLang's Triton attention: `extend_attention_fwd` over a cached prefix, `decode_attention_fwd` split along the keys.

    pip install --no-deps sglang==0.5.23

Only the files of the kernels are imported, since the package asks for a whole serving engine. float16 and bfloat16;
cached tokens are named one by one. Not timed, since its engine does it once a step for all layers: turning the block
table into a list of slots, choosing the number of splits, allocating their partial sums.
"""

from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vila_triton.ops import decode_attention, prefill_attention
from vila_triton.registry import Unsupported

from ._cached_conversion import prepared
from ._import_file import borrow
from ._offline import check, offline, promises_nothing

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
with offline():
    extend = borrow("sglang.kernels.ops.attention.extend_attention", **STUBS)
    decode = borrow("sglang.kernels.ops.attention.decode_attention", **STUBS)
    metadata = borrow("sglang.kernels.ops.attention.metadata")
SPLITS = 8  # the most a sequence is cut into: its default `--triton-attention-num-kv-splits`


class Slots(NamedTuple):
    """Where the cached tokens of each sequence lie, all sequences end to end."""

    start: Tensor  # [b+1] int32
    slot: Tensor  # int64, one a cached token


def slots(block_table: Tensor, lengths: Tensor, pages: Tensor) -> Slots:
    """Waits for the device, since the number of cached tokens is known only there."""
    length = pages.shape[1]
    slot = block_table.long()[..., None] * length + torch.arange(length, device=pages.device)  # [b, pages, l]
    slot = slot.flatten(1)
    start = F.pad(lengths.cumsum(0), (1, 0)).int()
    if pages.is_meta:  # no one knows how many
        return Slots(start, slot.flatten())
    return Slots(start, slot[torch.arange(slot.shape[1], device=pages.device) < lengths[:, None]])


class Parts(NamedTuple):
    """Into how many splits each sequence is cut, and what the splits leave behind."""

    splits: Tensor  # [b] int32
    values: Tensor  # [b, h, SPLITS, d] float32
    peaks: Tensor  # [b, h, SPLITS] float32


def parts(lengths: Tensor, q: Tensor, pages: Tensor) -> Parts:
    """Errors: Unsupported if a sequence has no token, which the library divides by."""
    if not lengths.is_meta and not lengths.all():
        raise Unsupported("sglang: a sequence has no cached token")
    (b, h, d), g = q.shape, pages.shape[2]
    splits = lengths.new_empty(b)
    if not lengths.is_meta:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        metadata.get_num_kv_splits_triton[(1,)](
            splits,
            lengths.contiguous(),
            b,
            1,
            h,
            g,
            SPLITS,
            processors,
            MAX_NUM_SEQ=max(256, triton.next_power_of_2(b)),
        )
    values = q.new_empty(b, h, SPLITS, d, dtype=torch.float32)
    return Parts(splits, values, values.new_empty(b, h, SPLITS))


def longest(query_start: Tensor) -> int:
    """New tokens of the sequence that has most."""
    return 1024 if query_start.is_meta else int(query_start.diff().max())


@prefill_attention.impl("sglang")
def prefill_attention_sglang(
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
    promises_nothing("sglang", policy, lse)
    check("sglang", q, k_pages, v_pages)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with offline(q), patch.object(extend, "CUDA_CAPABILITY", torch.cuda.get_device_capability(), create=True):
        start, slot = prepared(slots, block_table, history, k_pages)
        extend.extend_attention_fwd(
            *(x.contiguous() for x in (q, k, v)),
            out,
            *(x.contiguous().flatten(0, 1) for x in (k_pages, v_pages)),  # [p·l, g, d]
            query_start.contiguous(),
            start,
            slot,
            custom_mask=None,
            is_causal=True,
            mask_indptr=None,
            max_len_extend=prepared(longest, query_start),
            k_scale=1.0,
            v_scale=1.0,
            sm_scale=scale,
        )
    return out


@decode_attention.impl("sglang")
def decode_attention_sglang(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor:
    promises_nothing("sglang", policy, lse)
    check("sglang", q, k_pages, v_pages)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with offline(q):
        start, slot = prepared(slots, block_table, lengths, k_pages)
        splits, values, peaks = prepared(parts, lengths, q, k_pages)
        decode.decode_attention_fwd(
            q.contiguous(),
            *(x.contiguous().flatten(0, 1) for x in (k_pages, v_pages)),  # [p·l, g, d]
            out,
            start,
            slot,
            values,
            peaks,
            splits,
            SPLITS,
            scale,
            k_scale=1.0,
            v_scale=1.0,
        )
    return out
