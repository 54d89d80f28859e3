"""Attention weights, which kernels never hold as a whole, recorded beside the attention of a step."""

from torch import Tensor

from vila_triton.ops import rope
from vila_triton.ops.attention import attention_weights, causal_mask

from ..models.llama import CosSin
from .paged_cache import PagedBatch, UncachedBatch


class AttentionRecorder:
    """Wraps an attention backend and appends the attention weights of each layer: [h, t, t] for each sequence."""

    def __init__(self, backend: PagedBatch | UncachedBatch, attentions: list[list[Tensor]]):
        if backend.context_lens.any():
            raise ValueError("attention weights are recorded of whole sequences, but a part of one is cached already")
        self.backend = backend
        self.phase = backend.phase
        self.attentions = attentions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: CosSin, scale: float) -> Tensor:
        """Record the attention weights of the layer, and attend with the wrapped backend."""
        seq_lens = self.backend.query_start_loc.diff().tolist()
        queries, keys = rope(q, *rotary), rope(k, *rotary)
        if isinstance(self.backend, PagedBatch):
            keys = self.backend.as_attended(keys, self.backend.k_pages[layer])
        weights = [
            attention_weights(qi, ki, scale, causal_mask(len(qi), len(ki), q.device)).flatten(0, 1).to(q.dtype)
            for qi, ki in zip(queries.split(seq_lens), keys.split(seq_lens))
        ]
        self.attentions[layer : layer + 1] = [weights]  # in the place of the same layer, if a checkpoint runs it anew
        return self.backend.attend(layer, q, k, v, rotary, scale)
