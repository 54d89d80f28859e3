"""The commands of `vila-triton`, a file each, found by being here.

    def configure(commands): ...      # adds its parsers, each with set_defaults(run=run)
    def run(args) -> int | None: ...  # does it; ValueError, KeyError, RuntimeError and OSError become one line

Importing one is quick: what is slow to import (torch, transformers) is imported where it is used.
"""
