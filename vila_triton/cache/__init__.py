"""The paged KV cache.

page_allocator   assigns pages to sequences: sharing, copy on write, reservations, eviction; no tensors
prefix_index     finds the pages that hold a prefix by its content; no tensors
paged_tensors    `PagedCache`: the pages as tensors, and the tensors of a step over them; of any model
paged_cache      `PagedKVCache`: those of a VILA, and the attention of a step
"""
