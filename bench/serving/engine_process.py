"""Our engine as what `bench.serve` asks beside servers: in a process of its own, with their environment.

`python -m bench.serving.engine_process --model FOLDER` reads lines of JSON and answers each with one:

    {"seed": 0, "number": 3, "count": 64, "streams": 4}    a segment of the trace and its load, or "rate" of it
    [[start, first, end, tokens, text], ...]               the outcomes of its requests
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._tool import kernels_option, tool
from bench.measure.rows import CHILD_FOLDER
from vila_triton.arguments import DTYPES, parse_kernel_settings
from vila_triton.device import pick_device
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.hf.configuration_vila_llama import parse_dtype
from vila_triton.registry import use

from .batches import BatchEngine
from .client import Load, Outcome
from .servers import end_session, last_words
from .trace import Segment, serve_config


@dataclass(frozen=True)
class EngineProcess:
    """The process, from outside."""

    process: subprocess.Popen[str]
    log: Any

    def ask(self, segment: Segment, load: Load) -> list[Outcome]:
        """Answers a segment of the trace under a load. Errors: RuntimeError with what it said last if it has ended."""
        assert self.process.stdin
        print(json.dumps(vars(segment) | vars(load)), file=self.process.stdin, flush=True)
        return [Outcome(request, *answer) for request, answer in zip(segment.requests, self.read_line(), strict=True)]

    def read_line(self) -> Any:
        """Returns the next answer."""
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"our engine ended: {last_words(self.log)}")
        return json.loads(line)


@contextmanager
def running_engine(
    python: Path, options: Sequence[str], environment: Mapping[str, str]
) -> Generator[EngineProcess, None, None]:
    """Runs the engine within a `with` block, which begins when the model is loaded. Errors: OSError, RuntimeError."""
    command = [str(python), "-m", "bench.serving.engine_process", *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=CHILD_FOLDER, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            engine = EngineProcess(process, log)
            engine.read_line()
            yield engine
        finally:
            end_session(process)


@tool
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, parents=[kernels_option()])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args(argv)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    dtype = parse_dtype(f"torch.{args.dtype}")
    with use(**parse_kernel_settings(args.set)):
        chat_model = load_chat_model(args.model, pick_device(args.device), dtype)
        engine = BatchEngine(chat_model, serve_config()[1].answer_tokens)
        print("[]", file=answers)
        for line in sys.stdin:
            asked = json.loads(line)
            segment = Segment(asked["seed"], asked["number"], asked["count"])
            outcomes = engine.ask_all(segment.requests, Load(asked["streams"], asked["rate"]))
            print(json.dumps([[o.start, o.first, o.end, o.tokens, o.text] for o in outcomes]), file=answers)


if __name__ == "__main__":
    sys.exit(main())
