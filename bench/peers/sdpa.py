"""torch's `scaled_dot_product_attention`, one of its back ends at a time, on the same tokens without pages.

Nothing to install. One sequence: "sdpa_flash" and "sdpa_cudnn" in prefill without a history, since these back ends take
no mask but the usual triangle, and the flash one in decoding. Gathering the tokens out of the pages is not timed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vila_triton.ops import Pages, decode_attention, prefill_attention
from vila_triton.ops.kv_write import gather
from vila_triton.registry import Unsupported

from ._cached_conversion import prepared
from ._offline import promises_nothing


def whole(block_table: Tensor, k_pages: Tensor, v_pages: Tensor, lengths: Tensor, *new: Tensor) -> list[Tensor]:
    """All keys and all values of the one sequence, [1, g, t, d] each; new: k and v of tokens that are in no page."""
    held = [gather(pages, block_table[0], int(lengths[0])) for pages in (k_pages, v_pages)]
    both = [torch.cat(parts) for parts in zip(held, new)] if new else held
    return [x.transpose(0, 1)[None].contiguous() for x in both]


def attend(where: str, back_end: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [s, h, d], the last of the tokens of k and v [1, g, t, d] -> [s, h, d]."""
    s, t = len(q), k.shape[2]
    if 1 < s < t:
        raise Unsupported(f"{where}: {s} new tokens after {t - s} need a mask that it does not take")
    try:
        with sdpa_kernel(back_end):
            grouped = q.shape[1] != k.shape[1]
            queries, causal = q.transpose(0, 1)[None].contiguous(), s == t > 1
            out = F.scaled_dot_product_attention(queries, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as reason:  # torch's way to say that a back end does not take a call
        raise Unsupported(f"{where}: {str(reason).splitlines()[0]}") from None
    return out[0].transpose(0, 1)


def check_one(where: str, b: int, policy: str, lse: bool, k_pages: Pages) -> None:
    promises_nothing(where, policy, lse)
    if not isinstance(k_pages, Tensor):
        raise Unsupported(f"{where}: does not read our quantised pages")
    if b != 1:
        raise Unsupported(f"{where}: {b} sequences of different lengths, expected one")


def prefill(name: str, back_end: SDPBackend) -> None:
    """Attach one back end as implementation `name`."""

    @prefill_attention.impl(name)
    def prefill_attention_sdpa(
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
        check_one(name, len(history), policy, lse, k_pages)
        all_k, all_v = prepared(whole, block_table, k_pages, v_pages, history, k, v)
        return attend(name, back_end, q, all_k, all_v, scale)


prefill("sdpa_flash", SDPBackend.FLASH_ATTENTION)
prefill("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION)


@decode_attention.impl("sdpa_flash")
def decode_attention_sdpa(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    policy: str = "fast",
    lse: bool = False,
) -> Tensor:
    check_one("sdpa_flash", len(lengths), policy, lse, k_pages)
    k, v = prepared(whole, block_table, k_pages, v_pages, lengths)
    return attend("sdpa_flash", SDPBackend.FLASH_ATTENTION, q, k, v, scale)
