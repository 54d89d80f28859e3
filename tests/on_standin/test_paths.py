"""Code that only a GPU runs, on the stand-in: it gives the answers of the CPU, and adds no wait of the host."""

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from hf_reference import build, padded, pictures
from torch import Tensor

from bench import standin, tune
from bench.measure.model_steps import ModelStep, try_peak_bytes
from bench.measure.runners import VilaTritonRunner
from bench.measure.runners import build_model as build_random
from bench.measure.timing import time_call
from bench.tuner import jobs
from vila_triton import VilaLlamaForCausalLM
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.engine import engine
from vila_triton.engine.sampling import SamplingParams
from vila_triton.models import llama
from vila_triton.registry import OPS, REFERENCE, count_calls, discover, use

if standin.is_active():
    from bench.standin import device
    from bench.standin.counts import counting

discover()
ROWS = [[1, 5, -200, 9, 30], [1, 7, 8]]
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}


@pytest.fixture(scope="module")
def models() -> tuple[VilaLlamaForCausalLM, VilaLlamaForCausalLM]:
    """One model, on the CPU and on the stand-in."""
    model = build(dtype=torch.float32, seed=2, gain=2.0)
    return model, deepcopy(model).cuda()  # pyright: ignore[reportCallIssue]


def test_stand_in_answers_equal_those_of_the_cpu(models: tuple) -> None:
    assert torch.equal(*answers(models, max_new_tokens=3))


@pytest.mark.parametrize(
    "options",
    [
        SAMPLED,
        {"num_beams": 2, "loop": "transformers"},
    ],
    ids=["sampled", "beams of transformers"],
)
def test_stand_in_answers_by_other_calls_equal_those_of_the_cpu(models: tuple, options: dict[str, Any]) -> None:
    with use(**dict.fromkeys(OPS, REFERENCE)):  # what is looked at lies outside the kernels
        assert torch.equal(*answers(models, max_new_tokens=6, **options))


def answers(models: Sequence[VilaLlamaForCausalLM], **options: Any) -> list[Tensor]:
    ids, mask = padded(ROWS, "left")
    given = {"images": pictures(models[0], 1), "attention_mask": mask}
    return [
        model.generate(ids.to(at), **{k: x.to(at) for k, x in given.items()}, eos_token_id=60, **options).cpu()
        for model in models
        for at in (model.device,)
    ]


@torch.no_grad()
def test_stand_in_logits_loss_and_second_step_equal_those_of_the_cpu(models: tuple) -> None:
    ids, mask = padded(ROWS, "right")
    images = pictures(models[0], 1)
    outputs: list[list[Tensor]] = []
    for model in models:
        at = model.device
        labels = ids.masked_fill(ids < 0, -100).to(at)
        given = {"attention_mask": mask.to(at), "images": images.to(at), "labels": labels}
        first = model(ids.to(at), **given, output_hidden_states=True)
        more = model(torch.tensor([[3], [4]], device=at), past_key_values=first.past_key_values)
        outputs.append([first.loss, first.logits, first.hidden_states[1], more.logits])
    for ours, theirs in zip(*outputs):
        assert theirs.is_cuda and torch.allclose(ours, theirs.cpu(), rtol=1e-4, atol=1e-5)


def waits(model: VilaLlamaForCausalLM, rows: int, new_tokens: int, **options: Any) -> Counter[tuple[str, str]]:
    """Count the waits of the host, by cause and file, while `new_tokens` are generated for each row of a batch."""
    cache = model.new_cache(rows)
    prompts = {seq: torch.tensor([1, 5, 7 + seq], device="cuda") for seq in cache.allocator.sequences}
    cache.ensure_capacity(dict.fromkeys(prompts, 3 + new_tokens))
    sampling = SamplingParams.from_generate_kwargs(rows, max_new_tokens=new_tokens, eos_token_id=60, **options)
    with counting() as counts:
        list(engine.generate_tokens(model.params, prompts, model.vila_config, cache, None, sampling))
    files: Counter[tuple[str, str]] = Counter()
    for (what, place), n in counts.waits.items():
        files[what, place.split(":")[0]] += n
    return files


@pytest.mark.parametrize("rows, options", [(1, {}), (2, {}), (2, SAMPLED)], ids=["one", "two", "two sampled"])
def test_decode_step_waits_for_nothing(models: tuple, rows: int, options: dict[str, Any]) -> None:
    """The third token waits no more than the two before it."""
    with use(**dict.fromkeys(OPS, REFERENCE) | {"decode_attention": "triton", "rope_kv_write": "triton"}):
        more = waits(models[1], rows, 3, **options) - waits(models[1], rows, 2, **options)
    assert more == Counter()


@torch.no_grad()
def test_decode_step_is_captured_and_replayed_for_other_tokens(models: tuple) -> None:
    model = models[1]
    cache = PagedKVCache(model.vila_config.llm, 4, dtype=torch.float32, device="cuda")
    for pages in cache.tensors:
        pages.zero_()
    seq = cache.allocator.add_sequence()
    x = llama.embed(model.params.llm, torch.tensor([7], device="cuda"))
    with cache.append_step({seq: 1}) as step, engine.use_default_kernels(x.device, "decode"):
        rotary = llama.rotary_cos_sin(step.positions, model.vila_config.llm)
        layer = model.params.llm.layers[0]

        def attention() -> Tensor:
            return llama.attention(layer, x, rotary, 0, model.vila_config.llm, step)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), count_calls() as calls:
            y = attention()
        x.neg_()
        graph.replay()
        assert torch.equal(y, attention())
    assert {("rope_kv_write", "triton"), ("decode_attention", "triton")} <= calls.keys()


def test_call_is_timed_by_a_graph_unless_it_waits() -> None:
    x = torch.ones(4096, device="cuda")
    timing = time_call(lambda x: x + 1, (x,), x.device, budget=0.001)
    assert timing.graph and timing.cold and timing.samples >= 5 and timing.seconds > 0
    waiting = time_call(lambda x: x + x.sum().item(), (x,), x.device, budget=0.001)
    assert not waiting.graph and waiting.seconds > 0


JOB = {"op": "swiglu", "impl": "triton", "sizes": {"s": 2, "f": 48, "dtype": "float16"}, "budget": 0.001}


def test_search_candidate_is_gated_and_timed() -> None:
    job = {**JOB, "config": dict(OPS["swiglu"].impls["triton"].configs[0])}
    assert jobs.run_job({**job, "stage": "gate"}) == {"reason": None}
    answer = jobs.run_job({**job, "stage": "time"})
    assert answer["graph"] and answer["cold"] and answer["seconds"] > 0


def test_search_candidate_out_of_memory_is_refused_and_the_next_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {**JOB, "config": dict(OPS["swiglu"].impls["triton"].configs[0]), "stage": "time"}
    with monkeypatch.context() as patch:
        patch.setattr(device.memories[0], "total", torch.cuda.memory_allocated() + 512)
        assert "out of memory" in jobs.run_job({**job, "sizes": {**JOB["sizes"], "s": 4096}})["reason"]
    assert jobs.run_job(job)["seconds"] > 0


def test_search_plan_is_for_the_present_gpu() -> None:
    args = tune.parser().parse_args(["swiglu", "--impl", "triton"])
    plan = tune.plan_search(OPS["swiglu"].impls["triton"], args)
    assert (plan.timer, plan.gpu.arch, plan.device) == ("gpu", "sm_90", torch.cuda.get_device_name())


def test_prefill_peak_memory_is_that_of_its_tensors(models: tuple) -> None:
    runner = VilaTritonRunner(build_random(models[0].vila_config.llm, "float32", torch.device("cuda")), REFERENCE)
    short, long = (try_peak_bytes(runner, ModelStep("memory", 1, n, 0), torch.device("cuda")) for n in (16, 64))
    assert isinstance(short, int) and isinstance(long, int) and 0 < short < long < 64 * 2**20
