"""Correctness of kernels, without hand-written tolerances: every implementation is compared with a float64 reference.

default_kernels    `python -m bench.correctness`: all implementations that run by default on this machine
error_budget       examples of an op, the error budget of each output element, and the property test
perturbation       arguments moved by one rounding each
guarded_memory     tensors between margins of NaN, which reveal stray reads and writes
compiled_plan      the few examples that a config is checked at as compiled
compiled_cell      the check of one config compiled for one target, with the blocks that it entered
compiled_table     the results of `python -m bench.compiled_check` as a document
compiled_calls     calls of kernels as compiled for a GPU that is not there
gate               the property test that an implementation must pass before it is timed
find_failure       search for the simplest failing example
failure_report     a failure in words, and a map of its errors
covering_array     few rows of sizes and options in which every two values meet
tiles              the tiles of launches, the sizes at their edges, and what checked calls covered of them
example_plan       the examples of an op that its implementations are checked at, by domain and config
repro_bundle       one call with its arguments in a file, to be replayed
shadow_recorder    a candidate beside the implementation that a model runs, call by call
"""
