"""The parts of `bench.tune`: what is tried (search, cost), by whom (jobs, workers), what is kept (journal, table)."""
