"""The attention of models of transformers by our ops: `attn_implementation="vila_triton"`.

transformers hands over queries [b, h, s, d] and all keys and values [b, g, t, d], those of its cache among them; a
cache of fixed size gives rows for tokens that are yet to come, too. A decode step copies nothing of these: to it, each
KV head of a sequence is a sequence of its own, and a row of the cache a page of one token. The block table names the
rows, so padding is left out wherever it lies, and a kernel sees the same strides at every length.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..ops import PagedKV, RaggedBatch, decode_attention, encoder_attention, prefill_attention
from ..ops.prefill_attention import without_context
from ..registry.gradients import without_gradient

NAME = "vila_triton"
OTHER_SCORES = {  # arguments of attention functions of transformers that change what is computed
    "softcap": "a cap of the scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "sliding_window": "a sliding window",
    "cu_seq_lens_q": "packed sequences",
}
NO_GRADIENT = "keys and values of a cache have no gradient here; run whole sequences in one pass, with use_cache=False"


def refusal(what: str) -> ValueError:
    """The error for a kind of attention that the ops do not compute."""
    return ValueError(
        f'attn_implementation="{NAME}" computes causal attention with padding, or attention of all tokens to all, '
        f'and not {what}; take attn_implementation="sdpa" or "eager" for this model'
    )


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The keys that the last of s new tokens sees: uint8 [b, 1, 1, t], or None for all; tokens before it see those up
    to their own.

    It is called as transformers calls its `AttentionMaskInterface`. q_length: s, behind q_offset cached tokens;
    kv_length: the keys that there are, more than t in a cache of fixed size; attention_mask [b, ...]: False at padding.
    No other attention takes uint8, so a mask of the caller is told from this one. Errors: ValueError for masks other
    than causal ones, and for padding where all tokens see all.
    """
    if local_size is not None:
        raise refusal(f"a sliding window or chunks of {local_size} tokens")
    if mask_function not in (causal_mask_function, bidirectional_mask_function) or kv_offset:
        raise refusal("a mask of another form, as of packed sequences, prefixes or blocks")
    is_causal = mask_function is causal_mask_function
    # Where several new tokens lie must be known on the host; where one lies need not be.
    end = int(q_offset + q_length) if q_length > 1 else q_offset + q_length
    t = int(end) if q_length > 1 and is_causal else kv_length
    mask = None
    if attention_mask is not None:
        mask = attention_mask[:, :t].bool()
        mask = F.pad(mask, (0, t - mask.shape[1]))  # transformers: keys beyond a mask are not seen
    is_padded = mask is not None and (torch.compiler.is_compiling() or not mask.all())
    if not is_causal:
        if is_padded:
            raise refusal("attention of all tokens to all with padding")
        return None
    if isinstance(end, int) and end == kv_length and not is_padded:
        return None
    is_seen = (torch.arange(t, device=device) < end).expand(batch_size, t)
    is_seen = is_seen if mask is None else is_seen & mask
    return is_seen[:, None, None].to(torch.uint8)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens, as transformers calls its `AttentionInterface`: query [b, h, s, d], key and value
    [b, g, t, d], attention_mask of `key_mask` -> ([b, s, h, d], None). The output at padding is 0.

    Whole sequences have a gradient; behind cached tokens the backward pass raises RuntimeError. Errors: ValueError for
    what the ops do not compute.
    """
    if dropout:
        raise refusal(f"dropout of {dropout} (config.attention_dropout = 0 trains without)")
    for name, what in OTHER_SCORES.items():
        if kwargs.get(name) is not None:
            raise refusal(what)
    if kwargs.get("output_attentions"):
        raise refusal("the attention weights that output_attentions asks for")
    if attention_mask is not None and (attention_mask.dtype != torch.uint8 or attention_mask.shape[1:3] != (1, 1)):
        raise refusal(f"a mask of the caller, {attention_mask.dtype} {list(attention_mask.shape)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and getattr(getattr(module, "config", None), "is_causal", True)
    if not is_causal:
        if query.shape != key.shape:
            raise refusal("cross-attention or grouped queries where all tokens see all")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return encoder_attention(q, k, v, scale), None
    is_seen = None if attention_mask is None else attention_mask[:, 0, 0].bool()
    s, t = query.shape[2], key.shape[2] if is_seen is None else is_seen.shape[1]
    attend = attend_one_token if s == 1 and t > 1 else attend_tokens
    if s < t and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        out = attend(query.detach(), key.detach(), value.detach(), is_seen, scale)
        return without_gradient(out, NO_GRADIENT, query, key, value), None
    return attend(query, key, value, is_seen, scale), None


def attend_one_token(query: Tensor, key: Tensor, value: Tensor, is_seen: Tensor | None, scale: float) -> Tensor:
    """The attention of a decode step: query [b, h, 1, d], key and value [b, g, t, d], is_seen [b, t] or None for all
    -> [b, 1, h, d].
    """
    (b, g, t, d), h = key.shape, query.shape[1]
    cache, seq_lens = rows_as_pages(key, value, t, is_seen)
    queries = query.reshape(b * g, h // g, d)  # [b, h, 1, d], whose heads are g runs of h/g
    return decode_attention(queries, cache, seq_lens, scale).view(b, 1, h, d)


def attend_tokens(query: Tensor, key: Tensor, value: Tensor, is_seen: Tensor | None, scale: float) -> Tensor:
    """The attention of a prefill: query [b, h, s, d], is_seen [b, t] or None for all, key and value [b, g, t, d], of
    which the last s are the new ones; rows beyond t are not there yet -> [b, s, h, d].
    """
    b, s = len(query), query.shape[2]
    t = key.shape[2] if is_seen is None else is_seen.shape[1]
    context_len = t - s
    parts = key.shape[1] if context_len else 1  # in which the heads of a sequence are taken, see `rows_as_pages`
    new = query, key[:, :, context_len:t], value[:, :, context_len:t]
    q, k, v = (rearrange(x, "b (part n) s d -> (b part s) n d", part=parts).contiguous() for x in new)
    new_lens = torch.full((b * parts,), s, device=query.device)
    if is_seen is not None:
        is_new = is_seen[:, context_len:].repeat_interleave(parts, 0)  # [b*part, s]
        rows, new_lens = is_new.flatten().nonzero()[:, 0], is_new.sum(1)
        q, k, v = q[rows], k[rows], v[rows]
    query_start_loc = F.pad(new_lens.cumsum(0), (1, 0)).int()
    if context_len:
        is_cached = None if is_seen is None else is_seen[:, :context_len]
        cache, context_lens = rows_as_pages(key, value, context_len, is_cached)
        batch = RaggedBatch(query_start_loc, context_lens)
    else:
        cache, batch = without_context(k, query_start_loc)
    out = prefill_attention(q, k, v, cache, batch, scale)
    if is_seen is not None:
        out = out.new_zeros(b * parts * s, *out.shape[1:]).index_copy(0, rows, out)
    return rearrange(out, "(b part s) n d -> b s (part n) d", b=b, part=parts)


def rows_as_pages(key: Tensor, value: Tensor, num_rows: int, is_seen: Tensor | None) -> tuple[PagedKV, Tensor]:
    """The first rows of keys and values [b, g, t, d] as b*g cached sequences of one KV head, and their lengths [b*g].

    A page is one row of one head, so pages are the tensors as they lie in a cache; others are copied. is_seen
    [b, num_rows]: which rows are tokens of the sequence; None for all.
    """
    b, g, t, d = key.shape
    if b * g * t > 2**31:
        raise refusal(f"{b * g * t} rows of a cache, whose numbers have 32 bits")
    rows = torch.arange(num_rows, device=key.device).expand(b, -1)
    seq_lens = torch.full((b,), num_rows, device=key.device)
    if is_seen is not None:
        rows, seq_lens = torch.where(is_seen, rows, num_rows).sort().values, is_seen.sum(1)  # what is seen comes first
    first_rows = torch.arange(b * g, device=key.device)[:, None] * t
    block_table = (first_rows + rows.repeat_interleave(g, 0)).int()  # [b*g, num_rows]
    k_pages, v_pages = (x.reshape(-1, 1, 1, d) for x in (key, value))
    return PagedKV(k_pages, v_pages, block_table), seq_lens.repeat_interleave(g).int()
