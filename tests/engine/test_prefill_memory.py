"""The memory of activations in a chunked prefill does not depend on the length of the prompt."""

from dataclasses import replace

import pytest
import torch

from bench.correctness.error_budget import DEVICE
from bench.prefill_memory import measure_prefill
from vila_triton.models import params, vila
from vila_triton.registry import discover, use
from vila_triton.tiny.config import CONFIG

discover()
SHALLOW = replace(CONFIG, llm=replace(CONFIG.llm, num_hidden_layers=2))
PARAMS = params.init_tree(vila.param_specs(SHALLOW, torch.float16), torch.Generator().manual_seed(0))
HERE = torch.device(DEVICE)


@pytest.mark.parametrize("chunk", [16, 48])
def test_chunked_prefill_activation_memory_does_not_grow_with_the_prompt(chunk: int) -> None:
    p = params.tree_map(lambda x: x.to(HERE), PARAMS)
    with use(prefill_attention="triton"):
        caches, peaks = zip(*(measure_prefill(p, SHALLOW, length, chunk, HERE) for length in (96, 144)))
        assert caches[1] == 1.5 * caches[0]
        assert peaks[1] - peaks[0] < 1024  # a longer block table and the like
        assert measure_prefill(p, SHALLOW, 144, 0, HERE)[1] > 1.5 * peaks[1]
