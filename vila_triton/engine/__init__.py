"""Runs a model on the paged KV cache.

engine     prefill, chunked prefill, decode
sampling   arguments of sampling, the choice of tokens on the device
draws      random numbers by counter
stopping   stop strings
"""
