"""The commands of `vila-triton`, one file each, found by being in this folder.

    QUESTION = "..."                  # under which of QUESTIONS `vila-triton --help` lists the commands of the file
    SUMMARIES = {"name": "..."}       # a line for each
    def configure(commands): ...      # adds a parser for each, with set_defaults(run=run)
    def run(args) -> int | None: ...  # runs it; a ValueError, RuntimeError or OSError becomes one line on stderr

A command imports what is slow to import (torch, transformers) inside its functions, so that help comes at once. Files
whose names begin with `_` are no commands.
"""

QUESTIONS = ("What is in my images?", "How do I get the checkpoint that I want?", "Which kernels run, and why?")
