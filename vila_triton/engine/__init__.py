"""Runs a model on the paged KV cache.

engine     prefill, chunked prefill, decode and sampling
stopping   stop strings
"""
