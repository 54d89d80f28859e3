"""vLLM's engine on a CPU, run by the Python that has vLLM: `PYTHON vllm_engine.py FOLDER DTYPE LENGTH`.

It reads lines of JSON and answers each with one, on what was standard output:

    {"prompts": [[id, ...], ...], "then": [id, ...]}   sequences to start; every token that follows in one is its `then`
    {"steps": 1}                                       that many steps of the engine

with {"seconds": of the last step, "tokens": in it}; the logits of its last tokens [b, v] are then in FOLDER/logits.pt.
A step is timed in the model runner: from its inputs to the logits, without scheduler and sampler. Only the standard
library, torch and vLLM are imported.
"""

import glob
import json
import os
import sys
import time
from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where its steps can be timed
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # all cores, and none kept free for a server
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "KMP_BLOCKTIME": "1",  # as vLLM's manual has it; idle threads then leave the cores to others, too
}


def restart_as_recommended() -> None:
    """Start this program again with the environment and the preloaded libraries that vLLM's manual recommends."""
    site = Path(next(path for path in sys.path if path.endswith("site-packages")))
    libraries = [*glob.glob(f"{site}/vllm*.libs/libtcmalloc*"), *glob.glob(f"{sys.prefix}/lib/libiomp5.so")]
    libraries += glob.glob(f"{site}/vllm/libs/libtcmalloc*")
    environment = {**os.environ, **ENVIRONMENT, "LD_PRELOAD": ":".join(libraries)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


class TimedEngine:
    """An engine whose every step is timed."""

    def __init__(self, folder: str, dtype: str, length: int):
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        llm = LLM(
            folder, dtype=dtype, max_model_len=length, max_num_batched_tokens=max(4096, length), max_num_seqs=32,
            enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=False, async_scheduling=False,
        )  # fmt: skip
        self.folder, self.engine, self.num_requests = Path(folder), llm.llm_engine, 0
        runner = self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.seconds, self.copying, self.tokens, self.logits = 0.0, 0.0, 0, None
        execute, compute = runner.execute_model, runner.model.compute_logits

        def timed_execute(scheduled, *args, **kwargs):
            start = time.perf_counter()
            out = execute(scheduled, *args, **kwargs)
            self.seconds = time.perf_counter() - start - self.copying
            self.tokens = scheduled.total_num_scheduled_tokens
            return out

        def kept_logits(*args, **kwargs):
            logits = compute(*args, **kwargs)
            start = time.perf_counter()
            self.logits = logits.clone()  # the sampler masks them
            self.copying = time.perf_counter() - start
            return logits

        runner.execute_model, runner.model.compute_logits = timed_execute, kept_logits

    def start(self, prompts: list[list[int]], then: list[int]) -> None:
        """Drop all sequences and add others."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        self.engine.abort_request([str(i) for i in range(self.num_requests)])
        while self.engine.has_unfinished_requests():
            self.engine.step()
        first = self.num_requests
        for i, (prompt, token) in enumerate(zip(prompts, then)):
            options = SamplingParams(
                max_tokens=64, temperature=0, ignore_eos=True, detokenize=False, allowed_token_ids=[token]
            )
            self.engine.add_request(str(first + i), {"prompt_token_ids": prompt}, options)
        self.num_requests += len(prompts)

    def answer(self, request: dict) -> dict:
        """Do what one line asks for."""
        import torch

        if "prompts" in request:
            self.start(request["prompts"], request["then"])
        for _ in range(request.get("steps", 0)):
            self.engine.step()
        if request.get("steps"):
            assert self.logits is not None
            torch.save(self.logits.float(), self.folder / "logits.pt")
        return {"seconds": self.seconds, "tokens": self.tokens}


def main() -> None:
    if "VLLM_NO_USAGE_STATS" not in os.environ:
        restart_as_recommended()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    engine = TimedEngine(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print(json.dumps({}), file=answers)
    for line in sys.stdin:
        print(json.dumps(engine.answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
