"""The parts of `bench.tune`.

search      the candidates of an implementation, in rounds
cost_model  predicted times, which rank and drop candidates
jobs        compile, emulate, gate and time one candidate
workers     processes that do the jobs; cluster: tasks of a Ray cluster
journal     results on disk, from which an interrupted search goes on
table       from a journal to a tuned table
"""
