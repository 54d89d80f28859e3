"""Our attention as a backend of vLLM: one layer of it, against float64 and vLLM's own backend."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.correctness.error_budget import check_within_budget, error_budget
from vila_triton.ops import PagedKV, RaggedBatch, prefill_attention

pytestmark = pytest.mark.vllm

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 4, 2, 32, 32
SCALE = HEAD_DIM**-0.5
# Of each sequence: tokens that are cached, and new ones. Decode rows come first, as vLLM sorts them.
MIXED = [(40, 1), (31, 1), (0, 1), (0, 17), (50, 20), (64, 5), (0, 70)]
DECODE_ONLY = [(40, 1), (31, 1), (32, 1)]
PREFILL_ONLY = [(0, 33), (32, 2)]
UNSORTED = [(40, 1), (0, 17), (31, 1)]


@pytest.fixture(scope="module")
def vllm_config(tiny_llama: Path) -> Any:
    """vLLM's config for the tiny model on our backend."""
    from vllm.engine.arg_utils import EngineArgs

    options: dict[str, Any] = dict(dtype="float32", attention_backend="CUSTOM", skip_tokenizer_init=True)
    return EngineArgs(str(tiny_llama), enforce_eager=True, **options).create_engine_config()


@dataclass
class Step:
    """New tokens of sequences in random pages, and vLLM's metadata of them.

    q, k, v        of the new tokens, [s, h, d] and [s, g, d], and of padding behind them
    keys, values   of every sequence [t, g, d], with its new tokens
    """

    lens: Sequence[tuple[int, int]]
    q: Tensor
    k: Tensor
    v: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    block_table: Tensor
    slot_mapping: Tensor
    query_start_loc: Tensor

    def slots(self, i: int) -> Tensor:
        """The slots of all tokens of sequence i."""
        position = torch.arange(sum(self.lens[i]))
        return self.block_table[i, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE

    def common_metadata(self, padding_tokens: int, padding_sequences: int) -> Any:
        """vLLM's metadata of this step, padded as its runner may pad it."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        pad = torch.nn.functional.pad
        starts = pad(self.query_start_loc, (0, padding_sequences), value=int(self.query_start_loc[-1]))
        seq_lens = torch.tensor([*map(sum, self.lens), *[0] * padding_sequences], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            num_reqs=len(seq_lens),
            num_actual_tokens=int(starts[-1]) + padding_tokens,
            max_query_len=max(new for _, new in self.lens),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=pad(self.block_table, (0, 0, 0, padding_sequences)),
            slot_mapping=pad(self.slot_mapping, (0, padding_tokens), value=-1),
        )


def random_step(lens: Sequence[tuple[int, int]], dtype: torch.dtype, padding: int = 0, seed: int = 0) -> Step:
    """A step of sequences with so many cached and new tokens each, whose last page is followed by unused ones."""
    rng = torch.Generator().manual_seed(seed)
    totals = [sum(pair) for pair in lens]
    keys, values = ([torch.randn(t, KV_HEADS, HEAD_DIM, generator=rng).to(dtype) for t in totals] for _ in range(2))
    width = max(-(-t // PAGE_SIZE) for t in totals) + 3
    pages = torch.randperm(len(lens) * width, generator=rng).int().view(len(lens), width)
    starts = torch.tensor([0, *(new for _, new in lens)]).cumsum(0).int()
    num_rows = int(starts[-1]) + padding
    q = torch.randn(num_rows, HEADS, HEAD_DIM, generator=rng).to(dtype)
    empty = torch.full((padding, KV_HEADS, HEAD_DIM), float("nan"), dtype=dtype)  # nothing may read padding
    k, v = (torch.cat([*(x[cached:] for x, (cached, _) in zip(xs, lens)), empty]) for xs in (keys, values))
    step = Step(lens, q, k, v, keys, values, pages, torch.empty(0), starts)
    step.slot_mapping = torch.cat([step.slots(i)[cached:] for i, (cached, _) in enumerate(lens)])
    return step


def empty_cache(step: Step, dtype: torch.dtype, layout: str) -> Tensor:
    """vLLM's KV cache of one layer [p, g, l, 2·d], full of NaN, at the strides of a layout."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    order = KVCacheLayout[layout].layer_view_order
    shape = (step.block_table.numel(), KV_HEADS, PAGE_SIZE, 2 * HEAD_DIM)
    storage = torch.full([shape[axis] for axis in order], float("nan"), dtype=dtype)
    return storage.permute([order.index(axis) for axis in range(4)])


def write_cached(step: Step, cache: Tensor) -> None:
    """Write the cached tokens into their slots, as [keys, values] of each head and token."""
    for i, (cached, _) in enumerate(step.lens):
        slots = step.slots(i)[:cached]
        both = torch.cat((step.keys[i][:cached], step.values[i][:cached]), -1)
        cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = both


def run_layer(config: Any, step: Step, layout: str = "LBNHC", padding: tuple[int, int] = (0, 0)) -> tuple[Tensor, Any]:
    """Our layer -> its output [s, h, d] without padding, and the cache behind it."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vila_triton.vllm_plugin.attention import PagedAttentionBackend

    dtype = step.q.dtype
    spec = FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=dtype)
    with set_current_vllm_config(config):
        layer = make_layer(dtype)
        builder = PagedAttentionBackend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
    cache = empty_cache(step, dtype, layout)
    write_cached(step, cache)
    output = torch.full_like(step.q, 7)
    metadata = builder.build(0, step.common_metadata(*padding))
    assert layer.forward(SimpleNamespace(), step.q, step.k, step.v, cache, metadata, output) is output
    num_tokens = int(step.query_start_loc[-1])
    assert (output[num_tokens:] == 7).all()
    return output[:num_tokens], cache


def make_layer(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from vila_triton.vllm_plugin.attention import PagedAttentionBackend

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        defaults = dict(num_heads=HEADS, head_size=HEAD_DIM, scale=SCALE, num_kv_heads=KV_HEADS)
        return PagedAttentionBackend.get_impl_cls()(**{**defaults, **options})
    finally:
        torch.set_default_dtype(before)


def run_layer_of_vllm(config: Any, step: Step) -> Tensor:
    """vLLM's own layer for CPUs -> its output [s, h, d]."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    dtype = step.q.dtype
    spec = FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=dtype)
    isa = _get_attn_isa(dtype, PAGE_SIZE, HEAD_DIM)
    layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    with set_current_vllm_config(config):
        impl = CPUAttentionBackend.get_impl_cls()(HEADS, HEAD_DIM, SCALE, KV_HEADS, None, None, "auto")
        builder = CPUAttentionBackend.get_builder_cls()(spec, [], config, torch.device("cpu"))
    builder.dtype = dtype
    cache = empty_cache(step, dtype, "LBHNC").zero_()  # vLLM's kernel multiplies what is unused by 0
    for i in range(len(step.lens)):
        impl.do_kv_cache_update(layer, step.keys[i], step.values[i], cache, step.slots(i))
    metadata = builder.build(0, step.common_metadata(0, 0))
    return impl.forward(layer, step.q, step.k, step.v, cache, metadata, torch.empty_like(step.q))


def exact_and_budget(step: Step) -> tuple[Tensor, Tensor]:
    """The output in float64, and the error that each element may have; decode rows are prompts of one token."""
    num_tokens = int(step.query_start_loc[-1])
    like = torch.zeros(step.block_table.numel(), PAGE_SIZE, KV_HEADS, HEAD_DIM, dtype=step.q.dtype)
    k_pages, v_pages = like, like.clone()
    for i, (cached, _) in enumerate(step.lens):
        slots = step.slots(i)[:cached]
        k_pages[slots // PAGE_SIZE, slots % PAGE_SIZE] = step.keys[i][:cached]
        v_pages[slots // PAGE_SIZE, slots % PAGE_SIZE] = step.values[i][:cached]
    cache = PagedKV(k_pages, v_pages, step.block_table)
    context_lens = torch.tensor([cached for cached, _ in step.lens], dtype=torch.int32)
    new = (x[:num_tokens] for x in (step.q, step.k, step.v))
    (exact,), (budget,) = error_budget(
        prefill_attention, (*new, cache, RaggedBatch(step.query_start_loc, context_lens), SCALE)
    )
    return exact, budget


@pytest.mark.parametrize(
    "lens", [MIXED, DECODE_ONLY, PREFILL_ONLY, UNSORTED], ids=["mixed", "decode", "prefill", "unsorted"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_step_is_within_budget_as_vllms_own_is(vllm_config: Any, lens: Any, dtype: torch.dtype) -> None:
    step = random_step(lens, dtype)
    exact, budget = exact_and_budget(step)
    check_within_budget(0, run_layer(vllm_config, step)[0], exact, budget)
    check_within_budget(0, run_layer_of_vllm(vllm_config, step), exact, budget)


def test_kernels_for_a_gpu_take_vllms_cache_as_it_lies(vllm_config: Any) -> None:
    """Interpreted here; keys and values are views of it."""
    ops = ("kv_write", "decode_attention", "prefill_attention")
    options = {"vila_triton": {"kernels": dict.fromkeys(ops, "triton")}}
    step = random_step(MIXED, torch.float32, padding=5)
    output, _ = run_layer(replace(vllm_config, additional_config=options), step, padding=(5, 2))
    check_within_budget(0, output, *exact_and_budget(step))


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "LHBNC"])
def test_padding_keeps_out_and_the_cache_holds_the_new_tokens(vllm_config: Any, layout: str) -> None:
    step = random_step(MIXED, torch.float32, padding=5)
    exact, budget = exact_and_budget(step)
    output, cache = run_layer(vllm_config, step, layout, padding=(5, 2))
    check_within_budget(0, output, exact, budget)
    expected = torch.full_like(cache, float("nan"))
    for i, (keys, values) in enumerate(zip(step.keys, step.values)):
        expected[step.slots(i) // PAGE_SIZE, :, step.slots(i) % PAGE_SIZE] = torch.cat((keys, values), -1)
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


def test_batch_invariant_bits_depend_on_neither_chunks_nor_company(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vila_triton.vllm_plugin.kernel_choices import kernel_choices

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    counts = kernel_choices(vllm_config).counts
    counts.clear()
    step = random_step([(0, 70), (40, 1), (31, 8)], torch.float32)
    together, _ = run_layer(vllm_config, step)
    for i, (cached, new) in enumerate(step.lens):
        rows = slice(*step.query_start_loc[i : i + 2].tolist())
        for begin, end in ((0, new), (new - 1, new), (new // 2, new)):  # alone; its last token; its second half
            alone = random_step([(cached + begin, end - begin)], torch.float32)
            alone.q = step.q[rows][begin:end]
            alone.keys, alone.values = [step.keys[i][: cached + end]], [step.values[i][: cached + end]]
            alone.k, alone.v = step.k[rows][begin:end], step.v[rows][begin:end]
            assert torch.equal(run_layer(vllm_config, alone)[0], together[rows][begin:end])
    assert {op for op, _ in counts} == {"kv_write", "prefill_attention"}  # the sums of others are in another order


def test_decode_rows_run_decode_attention_and_all_others_prefill_attention(vllm_config: Any) -> None:
    from vila_triton.vllm_plugin.kernel_choices import kernel_choices

    counts = kernel_choices(vllm_config).counts
    counts.clear()
    run_layer(vllm_config, random_step(DECODE_ONLY, torch.float32))
    assert {op for op, _ in counts} == {"kv_write", "decode_attention"}
    run_layer(vllm_config, random_step(PREFILL_ONLY, torch.float32))
    run_layer(vllm_config, random_step(MIXED, torch.float32))
    assert counts == {("kv_write", "reference"): 3, ("decode_attention", "aten"): 2, ("prefill_attention", "aten"): 2}


def test_warming_up_attends_to_nothing(vllm_config: Any) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(vllm_config):
        layer = make_layer()
    x = torch.randn(3, HEADS, HEAD_DIM)
    assert not layer.forward(SimpleNamespace(), x, x[:, :2], x[:, :2], torch.empty(0), None, x.clone()).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alibi_slopes": [0.5] * HEADS}, "ALiBi"),
        ({"sliding_window": 64}, "a sliding window of 64 tokens"),
        ({"logits_soft_cap": 30.0}, "scores capped at 30.0"),
        ({"attn_type": "encoder_only"}, "attention of the type encoder_only"),
        ({"attn_type": "encoder_decoder"}, "attention of the type encoder_decoder"),
        ({"kv_sharing_target_layer_name": "layer"}, "layers that share one KV cache"),
        ({"sinks": torch.zeros(HEADS)}, "sinks"),
        ({"head_size": 256}, "heads of 256 numbers, expected 32 or 16 or 24 or"),
        ({"dtype": torch.float64}, "float64, expected float32 or float16 or bfloat16"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache in fp8, expected auto or float32"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_sentence(
    vllm_config: Any, options: dict[str, Any], message: str
) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(vllm_config), pytest.raises(ValueError) as error:
        make_layer(**options)
    assert str(error.value).startswith(f"the attention of vila_triton does not support {message}")
    assert str(error.value).endswith("; choose another --attention-backend")


def test_blocks_and_masks_are_refused_by_the_builder(vllm_config: Any) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vila_triton.vllm_plugin.attention import PagedAttentionBackend

    def make_builder(block_size: int) -> Any:
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.float32)
        return PagedAttentionBackend.get_builder_cls()(spec, ["layer"], vllm_config, torch.device("cpu"))

    with pytest.raises(ValueError, match="does not support blocks of 20 tokens, expected 16 or 24 or"):
        make_builder(20)
    metadata = random_step(MIXED, torch.float32).common_metadata(0, 0)
    with pytest.raises(ValueError, match="does not support attention that is not causal"):
        make_builder(PAGE_SIZE).build(0, metadata.replace(causal=False))


def test_a_quantized_output_is_refused(vllm_config: Any) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(vllm_config):
        layer = make_layer()
    x = torch.randn(3, HEADS, HEAD_DIM)
    with pytest.raises(NotImplementedError, match="does not support an output that is quantized"):
        layer.forward(SimpleNamespace(), x, x[:, :2], x[:, :2], torch.empty(0), None, x, output_scale=torch.ones(1))


def test_a_model_may_choose_our_attention_unless_the_user_chose() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vila_triton.vllm_plugin.attention import choose_attention

    for chosen, expected in ((None, "CUSTOM"), ("CPU_ATTN", "CPU_ATTN"), ("FLASH_ATTN", "FLASH_ATTN")):
        backend = chosen and AttentionBackendEnum[chosen]
        config: Any = SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
        choose_attention(config)
        assert config.attention_config.backend is AttentionBackendEnum[expected]
