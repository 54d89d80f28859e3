"""Kernels that a decode step launches for a decoder layer with int4 weights."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import standin
from vila_triton import VilaLlamaForCausalLM
from vila_triton.engine import engine
from vila_triton.models import llama

if standin.is_active():
    from bench.standin.counts import counting

CHECKPOINT = Path(__file__).parents[2] / "vila_triton" / "tiny" / "checkpoint-int4"


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 4])
def test_decode_step_launches_eight_kernels_a_layer(rows: int) -> None:
    """Norm, q with k and v, rotation and writing, attention, o with the residual, norm, gate with up, down with it."""
    model = VilaLlamaForCausalLM.from_pretrained(CHECKPOINT, device="cuda")
    p, cfg, cache = model.params.llm, model.vila_config.llm, model.new_cache(rows, 4)
    found: Counter[int] = Counter()
    with (
        cache.append_step(dict.fromkeys(cache.allocator.sequences, 1)) as step,
        engine.use_default_kernels(step.positions.device, "decode"),
    ):
        x = llama.embed(p, torch.arange(7, 7 + rows, device="cuda"))
        for layers in (p.layers[:1], p.layers[:2]):
            with counting() as counts:
                llama.forward(llama.Llama(p.embedding, layers, p.norm, p.head), x, step.positions, cfg, step)
            found[len(layers)] = sum(counts.launches.values())
            assert not {"add", "add_", "cat"} & counts.operators.keys()  # nothing is added or joined beside them
    assert found[2] - found[1] == 8
