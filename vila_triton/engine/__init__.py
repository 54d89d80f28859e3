"""Runs a model on the paged KV cache.

engine              prefill, chunked prefill and generation
sampling            arguments of sampling, the choice of tokens on the device
draws               random numbers by counter
current_parameters  the parameters while a model answers
decode_step         one step of decoding, at fixed shapes and addresses
decode_graphs       its buffers, and the graphs that a GPU replays
decode_loop         answers by such steps, read one step behind on a GPU
open_loop           answers for callers who look at the scores of every step
stopping            stop strings
default_kernels     the kernels that run in each phase
"""
