"""A step of training on the stand-in: the gradients are those of the CPU, by a GPU's kernels; ops wait for nothing."""

from copy import deepcopy
from typing import Any

import torch
from hf_reference import build, padded, pictures
from torch import Tensor

from bench import standin
from vila_triton import VilaLlamaForCausalLM
from vila_triton.registry import count_calls, discover

if standin.is_active():
    from bench.standin.counts import counting

discover()
ROWS = [[1, -200, 5], [7, 8]]
GPU_KERNELS = ["rms_norm", "swiglu", "prefill_attention", "encoder_attention"]


def gradients(model: VilaLlamaForCausalLM) -> dict[str, Tensor]:
    ids, mask = padded(ROWS)
    model.zero_grad()
    loss: Any = model(ids.to(model.device), attention_mask=mask, images=pictures(model, 1), labels=ids).loss
    loss.backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_equal_those_of_the_cpu_by_the_kernels_of_a_gpu() -> None:
    model: Any = build(dtype=torch.float32, seed=2, gain=2.0).train()
    expected, model = gradients(model), deepcopy(model).cuda()
    with count_calls() as calls, counting() as counts:
        found = gradients(model)
    waiting = {place for _, place in counts.waits}
    assert not [x for x in waiting if x.startswith(("vila_triton/registry", "vila_triton/ops", "kernels"))]
    assert {f"{name}_backward" for name in GPU_KERNELS} <= {name for name, impl in calls if impl == "triton"}
    assert found.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * largest)
