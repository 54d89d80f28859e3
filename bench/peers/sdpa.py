"""torch's `scaled_dot_product_attention`, one of its backends at a time, on the same tokens without pages.

Nothing to install. One sequence: "sdpa_flash" and "sdpa_cudnn" in prefill without a context, since these backends take
no mask but the usual triangle, and the flash one in decoding. Gathering the tokens out of the pages is not timed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vila_triton.ops import PagedKV, RaggedBatch, decode_attention, prefill_attention
from vila_triton.ops.kv_pages import gather_tokens
from vila_triton.registry import Unsupported

from ._cached_conversion import convert_once
from ._offline import check_plain_attention
from ._repage import plain_pages


def gather_all(block_table: Tensor, k_pages: Tensor, v_pages: Tensor, seq_lens: Tensor, *new: Tensor) -> list[Tensor]:
    """All keys and all values of the one sequence, [1, g, t, d] each; new: k and v of tokens that are in no page."""
    cached = [gather_tokens(pages, block_table[0], int(seq_lens[0])) for pages in (k_pages, v_pages)]
    keys_and_values = [torch.cat(parts) for parts in zip(cached, new)] if new else cached
    return [x.transpose(0, 1)[None].contiguous() for x in keys_and_values]


def run_backend(peer: str, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """q [s, h, d], the last of the tokens of k and v [1, g, t, d] -> [s, h, d]."""
    s, t = len(q), k.shape[2]
    if 1 < s < t:
        raise Unsupported(f"{peer}: {s} new tokens after {t - s} need a mask that it does not take")
    try:
        with sdpa_kernel(backend):
            has_gqa = q.shape[1] != k.shape[1]
            queries, is_causal = q.transpose(0, 1)[None].contiguous(), s == t > 1
            out = F.scaled_dot_product_attention(
                queries, k, v, is_causal=is_causal, scale=softmax_scale, enable_gqa=has_gqa
            )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch's way to say that a backend does not take a call
        raise Unsupported(f"{peer}: {str(error).splitlines()[0]}") from None
    return out[0].transpose(0, 1)


def check_single_sequence(peer: str, b: int, numerics: str, return_lse: bool) -> None:
    """Raises Unsupported unless a call wants plain attention of a batch of b = 1 sequence."""
    check_plain_attention(peer, numerics, return_lse)
    if b != 1:
        raise Unsupported(f"{peer}: {b} sequences of different lengths, expected one")


def register_prefill(name: str, backend: SDPBackend) -> None:
    """Attach one backend as implementation `name`."""

    @prefill_attention.impl(name)
    def prefill_attention_sdpa(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: PagedKV,
        batch: RaggedBatch,
        softmax_scale: float,
        numerics: str = "fast",
        return_lse: bool = False,
    ) -> Tensor:
        check_single_sequence(name, batch.num_seqs, numerics, return_lse)
        pages = plain_pages(name, cache)
        all_k, all_v = convert_once(gather_all, cache.block_table, *pages, batch.context_lens, k, v)
        return run_backend(name, backend, q, all_k, all_v, softmax_scale)


register_prefill("sdpa_flash", SDPBackend.FLASH_ATTENTION)
register_prefill("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION)


@decode_attention.impl("sdpa_flash")
def decode_attention_sdpa(
    q: Tensor,
    cache: PagedKV,
    seq_lens: Tensor,
    softmax_scale: float,
    numerics: str = "fast",
    return_lse: bool = False,
) -> Tensor:
    """Runs torch's flash backend on the query of one sequence, q [1, h, d], and returns [1, h, d].

    Raises Unsupported for more sequences, for quantized pages, and for calls that the backend does not take.
    """
    check_single_sequence("sdpa_flash", len(seq_lens), numerics, return_lse)
    k, v = convert_once(gather_all, cache.block_table, *plain_pages("sdpa_flash", cache), seq_lens)
    return run_backend("sdpa_flash", SDPBackend.FLASH_ATTENTION, q, k, v, softmax_scale)
