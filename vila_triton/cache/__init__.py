"""The paged KV cache.

page_allocator   assigns pages to sequences: sharing, copy on write, reservations, eviction; no tensors
prefix_index     finds the pages that hold a prefix by its content; no tensors
paged_cache      the pages as tensors, and the attention of a step over them
"""
