"""Load on a server: requests, a client, what its answers took, and the servers that `bench.serve` compares.

trace           requests with known answers and times of arrival, from a seed
client          an OpenAI-compatible server asked over HTTP, with the standard library alone
latency         statistics of answers
servers         processes that serve a model
batches         our own engine on the same requests, without a server
engine_process  that engine in a process of its own
other_load      the work of other processes meanwhile
"""
