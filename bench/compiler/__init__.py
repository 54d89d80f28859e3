"""Kernels compiled for GPUs that need not be present, and the figures read from them.

cross_compile     compiles the kernels that a call launches
gpus              the limits of each GPU, and occupancy
production_sizes  the sizes that a kernel is compiled for by default
resources         registers, spills and shared memory of a kernel
disassembly       assembly as instructions and loops
loops             the work that one iteration of a loop does, from TTGIR
kernel_stats      all figures of one kernel
precision         products and roundings of less precision than the source's
inspect_text, inspect_plot, inspect_peer   the output of `bench.inspect`
"""
