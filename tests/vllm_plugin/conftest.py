"""Tests inside vLLM, which are marked `vllm`: its environment, a tiny language model, and engines of it.

A module here imports vLLM in its tests and fixtures only, so that it can be collected where there is none.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from small_hugging_face import small_model

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
VOCAB_SIZE = 256


@pytest.fixture(scope="session", autouse=True)
def vllm_environment() -> Iterator[None]:
    """The environment that vLLM reads while it is imported and when an engine starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random LLaMA, whose answers depend on what is attended to."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    small_model("llama", vocab_size=VOCAB_SIZE, max_position_embeddings=512).save_pretrained(folder)
    return folder


class Engines:
    """The engine of vLLM that runs in this process, of which there can be one at a time."""

    def __init__(self, default_model: Path):
        self.default_model = default_model
        self.options: dict[str, Any] | None = None
        self.engine: Any = None

    def __call__(self, model: Path | None = None, **options: Any) -> Any:
        """`vllm.LLM` of a model, by default the tiny LLaMA in float32, with these options; the running one if it has
        the same, else that is stopped.
        """
        defaults = dict(
            model=str(model or self.default_model),
            dtype="float32",
            max_model_len=512,
            enforce_eager=True,
            skip_tokenizer_init=True,
            worker_extension_cls="vila_triton.vllm_plugin.worker.KernelCounts",
        )
        options = {**defaults, **options}
        if options != self.options:
            self.stop()
            from vllm import LLM

            self.engine, self.options = LLM(**options), options
        return self.engine

    def stop(self) -> None:
        if self.engine is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self.engine.llm_engine.engine_core.shutdown()
            self.engine = self.options = None
            cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def start_engine(tiny_llama: Path) -> Iterator[Engines]:
    """See `Engines`."""
    engines = Engines(tiny_llama)
    yield engines
    engines.stop()


def greedy(engine: Any, prompts: Sequence[Sequence[int]], max_tokens: int = 16) -> list[Any]:
    """vLLM's outputs for prompts of token ids, all in one batch, without stop tokens."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
    return engine.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)


def answers(engine: Any, prompts: Sequence[Sequence[int]], max_tokens: int = 16) -> list[list[int]]:
    """The token ids of `greedy`."""
    return [list(output.outputs[0].token_ids) for output in greedy(engine, prompts, max_tokens)]
