"""Global, shared and local memory, with the checks and counters of every access."""
