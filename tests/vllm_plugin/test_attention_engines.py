"""Engines of vLLM on our attention: answers, cached prefixes, counts of calls, and kernels of one's own."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import VOCAB_SIZE, Engines, answers, greedy

pytestmark = pytest.mark.vllm

PAGE_SIZE = 32
# Of mixed lengths, one of a single token, one of several chunks, two with a common beginning.
PROMPTS = [[(7 * i + j * j) % (VOCAB_SIZE - 3) + 3 for j in range(n)] for i, n in enumerate([3, 40, 150, 1, 300, 40])]
PROMPTS.append([*PROMPTS[4][:96], 5, 6, 7])
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
WRONG_KERNEL = """
from vila_triton.ops import decode_attention


@decode_attention.impl("without_scale")
def decode_attention_without_scale(q, cache, seq_lens, softmax_scale, numerics="fast", return_lse=False):
    return decode_attention.reference(q, cache, seq_lens, 0.0, numerics, return_lse)
"""


@pytest.fixture(scope="module")
def vllms_answers(start_engine: Engines) -> list[list[int]]:
    """The answers of vLLM's own attention."""
    engine = start_engine()
    assert attention_classes(engine) == {"CPUAttentionBackendImpl"}
    before = kernel_counts(engine)
    found = answers(engine, PROMPTS)
    assert kernel_counts(engine) == before
    return found


@pytest.fixture
def our_engine(vllms_answers: list[list[int]], start_engine: Engines) -> Any:
    """An engine on our attention, which takes prompts in chunks of 64 tokens at most."""
    return start_engine(attention_backend="CUSTOM", block_size=PAGE_SIZE, **CHUNKED)


def kernel_counts(engine: Any) -> Counter[str]:
    """The calls of ops so far by engines that chose as this one did: all of them run in this process."""
    (counts,) = engine.collective_rpc("kernel_counts")
    return Counter(counts)


def attention_classes(engine: Any) -> set[str]:
    """The names of the classes that attend in the layers of an engine's model."""
    found = engine.apply_model(lambda model: [type(x.impl).__name__ for x in model.modules() if hasattr(x, "impl")])
    return {name for names in found for name in names}


def test_answers_are_those_of_vllms_attention(our_engine: Any, vllms_answers: list[list[int]]) -> None:
    before = kernel_counts(our_engine)
    assert answers(our_engine, PROMPTS) == vllms_answers
    calls = kernel_counts(our_engine) - before
    assert calls.keys() == {"kv_write=reference", "decode_attention=aten", "prefill_attention=aten"}
    chunks = sum(map(len, PROMPTS)) // 64
    assert calls["prefill_attention=aten"] >= 2 * chunks and calls["decode_attention=aten"] >= 2 * 15  # in both layers


def test_answers_alone_are_those_in_a_batch(our_engine: Any, vllms_answers: list[list[int]]) -> None:
    assert [answers(our_engine, [prompt])[0] for prompt in PROMPTS] == vllms_answers


def test_a_cached_prefix_gives_the_same_answers(our_engine: Any, vllms_answers: list[list[int]]) -> None:
    assert our_engine.reset_prefix_cache()
    assert not any(output.num_cached_tokens for output in greedy(our_engine, PROMPTS[:3]))
    outputs = greedy(our_engine, PROMPTS)
    assert [output.num_cached_tokens for output in outputs[:3]] == [0, 32, 128]
    assert [list(output.outputs[0].token_ids) for output in outputs] == vllms_answers


def test_a_wrong_kernel_of_ones_own_changes_the_answers(
    start_engine: Engines, vllms_answers: list[list[int]], tmp_path: Path
) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG_KERNEL)
    options = {"kernels": {"decode_attention": "without_scale"}, "kernel_paths": [str(file)]}
    engine = start_engine(attention_backend="CUSTOM", additional_config={"vila_triton": options})
    found = answers(engine, PROMPTS)
    assert [ids[0] for ids in found] == [ids[0] for ids in vllms_answers]  # prefill is right
    assert all(ids != expected for ids, expected in zip(found, vllms_answers))
    assert kernel_counts(engine)["decode_attention=without_scale"] >= 2 * 15


def test_a_wrong_choice_stops_the_start(start_engine: Engines) -> None:
    options = {"vila_triton": {"kernels": {"decode_attention": "fast"}}}
    with pytest.raises(ValueError, match="'decode_attention' has no implementation 'fast'; there are: reference, "):
        start_engine(attention_backend="CUSTOM", additional_config=options)


def test_who_does_not_choose_our_attention_runs_vllms_before_and_after(our_engine: Any, start_engine: Engines) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert attention_classes(our_engine) == {"PagedAttention"}
    for chosen in (None, "CPU_ATTN"):
        assert attention_classes(start_engine(attention_backend=chosen)) == {"CPUAttentionBackendImpl"}
    assert AttentionBackendEnum.CPU_ATTN.is_overridden()
    assert AttentionBackendEnum.CPU_ATTN.get_class() is CPUAttentionBackend
