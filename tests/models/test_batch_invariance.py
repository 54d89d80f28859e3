"""With numerics "batch_invariant" a model's logits have the same bits in any batch, chunking, page layout and cache.

The engine's own choices run, on a CPU as on a GPU: nothing is put in their place.
"""

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_reference import build, padded, words
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.correctness.error_budget import DEVICE, UNSUPPORTED_DTYPES, example_args
from vila_triton import VilaLlamaForCausalLM
from vila_triton.cache.paged_cache import KV_DTYPES, PagedKVCache
from vila_triton.engine import engine
from vila_triton.models import llama, vila
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import OPS, Impl, IntRange, count_calls, discover, use
from vila_triton.registry.kernel_config import configured_choices

discover()
pytestmark = pytest.mark.usefixtures("dots_in_order")
WHOLE = words(37).to(DEVICE)
OTHERS = [words(n).to(DEVICE) for n in (5, 1, 18)]
HELD = [dtype for dtype in KV_DTYPES[1:] if DEVICE == "cpu" or dtype not in UNSUPPORTED_DTYPES]
CASES: list[Any] = [("small", "own", dtype) for dtype in (None, *HELD)]
CASES += [("small", "triton", None), ("small", "triton", "int4"), ("small", "simple", None)]  # which reads plain pages
CASES += [("checkpoint", "own", None), ("checkpoint-int4", "own", None)]
CASES += [pytest.param("one layer", "cuda", None, marks=pytest.mark.on_gpu)]


@dataclass(frozen=True)
class Model:
    params: vila.Vila
    cfg: Any
    dtype: torch.dtype


def built(**changes: Any) -> VilaLlamaForCausalLM:
    model: Any = build(dtype=torch.float32, seed=3, **changes)
    return model.to(DEVICE)


@lru_cache
def named(name: str) -> Model:
    """A small model, a bundled one, or the first layer of it."""
    if name == "small":
        made: Any = built(gain=2.0, llm={"head_dim": 16})
        return Model(made.params, made.vila_config, made.dtype)
    folder = BUNDLED_CHECKPOINT if name == "one layer" else BUNDLED_CHECKPOINT.with_name(name)
    made = VilaLlamaForCausalLM.from_pretrained(folder, device=DEVICE)
    llm = made.params.llm
    few = replace(llm, layers=llm.layers[:1]) if name == "one layer" else llm
    return Model(replace(made.params, llm=few), made.vila_config, made.dtype)


def run(model: Model, cache: PagedKVCache, seq: int, start: int, cuts: list[int], others: list[Tensor]) -> Tensor:
    """Hidden states of WHOLE from `start` on [t - start, e], in chunks; `others` go along with the first of them."""
    states = []
    for begin, end in pairwise([start, *(cut for cut in cuts if cut > start), len(WHOLE)]):
        company = {cache.allocator.add_sequence(): row for row in others} if begin == start else {}
        rows = dict(sorted({**company, seq: WHOLE[begin:end]}.items(), key=lambda item: len(item[1])))
        keep = {one: end - begin if one == seq else 0 for one in rows}
        hidden = engine.extend(model.params, rows, model.cfg, cache, states_to_keep=keep)
        states.append(hidden[list(rows).index(seq)])
    return torch.cat(states)


@torch.no_grad()
def logits(
    model: Model,
    kernels: str,
    kv_dtype: str | None,
    cuts: list[int],
    page_size: int = 16,
    others: list[Tensor] | None = None,
    known: int = 0,
    policy: str = "batch_invariant",
) -> Tensor:
    """Of every token of WHOLE but the first `known`, which are adopted from a sequence that was run before.

    kernels: those this device runs under the policy ("own"), those a GPU does ("cuda": interpreted, if need be), or one
    of prefill_attention.
    """
    how: dict[str, Any] = {"page_size": page_size, "kv_dtype": kv_dtype, "numerics": policy}
    cache = PagedKVCache(model.cfg.llm, 256, dtype=model.dtype, device=DEVICE, **how)
    random.Random(len(cuts)).shuffle(cache.allocator.free_pages)
    choice: dict[str, Any] = {"prefill_attention": kernels} if kernels not in ("own", "cuda") else {}
    if kernels == "cuda":
        choice = dict(configured_choices("cuda", "batch_invariant"))
    with use(**choice):
        if known:
            run(model, cache, first := cache.allocator.add_sequence(), 0, [known], [])
            cache.allocator.register_prefix(first, WHOLE[:known].tolist())
        cache.allocator.reuse_prefix(seq := cache.allocator.add_sequence(), WHOLE.tolist())
        assert cache.length(seq) == known
        hidden = run(model, cache, seq, known, cuts, others or [])
        with engine.use_default_kernels(hidden.device, "batch_invariant" if policy == "batch_invariant" else "prefill"):
            return llama.logits(model.params.llm, hidden)


@pytest.mark.parametrize("name, kernels, kv_dtype", CASES)
def test_logits_bitwise_equal_for_every_batch_chunking_and_page_size(name: str, kernels: str, kv_dtype: str) -> None:
    """The bug of https://github.com/deepseek-ai/FlashMLA/issues/212: the likeliest token depends on the batch."""
    model = named(name)
    expected = logits(model, kernels, kv_dtype, [])

    @settings(max_examples=max(1, settings().max_examples // (2 if name == "small" and kernels == "own" else 9)))
    @given(
        cuts=st.lists(st.integers(1, 36), max_size=5, unique=True).map(sorted),
        page_size=st.sampled_from([1, 4, 16, 32, 64, 128, 256] if kernels == "own" else [16, 32, 64]),
        others=st.permutations(OTHERS).flatmap(lambda rows: st.sampled_from([rows[:n] for n in range(4)])),
        known=st.integers(0, 36),
    )
    def holds(cuts: list[int], page_size: int, others: list[Tensor], known: int) -> None:
        found = logits(model, kernels, kv_dtype, cuts, page_size, others, known)
        assert torch.equal(found, expected[known:])

    holds()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's library multiplies 16 rows otherwise than the first 16 of 37")
def test_fast_numerics_depend_on_chunks_with_quantized_pages() -> None:
    whole, chunked = (logits(named("small"), "own", "int4", cuts, policy="fast") for cuts in ([], [16]))
    assert torch.equal(whole[:16], chunked[:16]) and not torch.equal(whole[16:], chunked[16:])


def test_batch_invariant_single_token_runs_prefill_attention() -> None:
    for policy, decoded in (("batch_invariant", 0), ("fast", 2 * 3)):  # layers and tokens
        with count_calls() as calls:
            logits(named("small"), "own", None, [34, 35, 36], policy=policy, known=34)
        assert sum(n for (op, _), n in calls.items() if op == "decode_attention") == decoded


@torch.no_grad()
def test_logits_bitwise_equal_with_images_and_padding() -> None:
    """Three conversations with 1, 2 and no pictures, padded to one batch, against each of them alone and in chunks."""
    model = built(gain=2.0, attention_numerics="batch_invariant", prefill_chunk_size=7)
    images = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = [words(n, seed=n).to(DEVICE) for n in (12, 14, 13)]
    rows[0][4] = rows[1][0] = rows[1][9] = vila.IMAGE_TOKEN_INDEX
    ids, mask = (x.to(DEVICE) for x in padded([row.tolist() for row in rows]))
    together = model(ids, images=images, attention_mask=mask)
    for row, own, found in zip(rows, images.split([1, 2, 0]), together.logits):
        alone = model(row[None], images=own if len(own) else None, chunk_prefilling=True).logits[0]
        assert torch.equal(found[: len(alone)], alone)


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", [None, "float16", "int8", "int4"])
def test_logits_bitwise_equal_with_and_without_cache(kv_dtype: str | None) -> None:
    model = built(gain=2.0, attention_numerics="batch_invariant", kv_dtype=kv_dtype)
    ids = words(30, seed=1).to(DEVICE)[None]
    assert torch.equal(model(ids, use_cache=False).logits, model(ids).logits)


@torch.no_grad()
def test_refused_argument_leaves_the_cache_unchanged() -> None:
    model = built()
    model(words(5, seed=1).to(DEVICE)[None], start_pos=0)
    with pytest.raises(ValueError, match="output_attentions needs the whole sequence in one pass"):
        model(words(1, seed=1).to(DEVICE)[None], start_pos=2, output_attentions=True)
    assert model.cache is not None and model.cache.length(0) == 5
    model.cache.allocator.add_sequence()
    for lengths in ([2, 999], [2], [-1, 0]):
        message = r"sequences of \[5, 0\] tokens cannot be rolled back to"
        with pytest.raises(ValueError, match=message), model.cache.roll_back(lengths, in_place=True):
            pass
    assert model.cache.length(0) == 5


ROWS = {"linear": 1, "rms_norm": 1, "swiglu": 2, "rope": 3}  # arguments that have a row for each of the result
MARKED = [(impl, i) for op in ROWS for impl in OPS[op].impls.values() for i in range(len(impl.configs))]


@pytest.mark.on_gpu
@pytest.mark.parametrize("impl, config", [case for case in MARKED if case[0].batch_invariant])
def test_row_of_batch_invariant_implementation_is_bitwise_equal_anywhere(impl: Impl, config: int) -> None:
    sizes: dict[str, Any] = {name: x.high for name, x in OPS[impl.op].domain.items() if isinstance(x, IntRange)}
    args = example_args(OPS[impl.op], seed=0, dtype="float32", **sizes)
    whole = impl(*args, config=impl.configs[config])
    for seed in range(3):
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[: 1 + 9 * seed]
        some = [x[order.to(x.device)] if i < ROWS[impl.op] else x for i, x in enumerate(args)]
        assert torch.equal(impl(*some, config=impl.configs[config]), whole[order.to(whole.device)])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"linear": "aten"}, "linear: aten is not allowed with batch-invariant numerics, .*: triton, rowwise"),
        ({"rms_norm": "reference"}, "rms_norm: reference is not allowed .*: triton, rowwise"),
        ({"prefill_attention": "aten"}, "prefill_attention: aten is not allowed .*: reference, triton, simple"),
        ({"int4_matmul": [[4, "gemv"], "splitk"]}, "int4_matmul: gemv or splitk, by size is not allowed .*gemv"),
    ],
)
def test_choice_that_is_not_batch_invariant_is_refused_before_anything_runs(choice: Any, message: str) -> None:
    model = built(attention_numerics="batch_invariant")
    with use(**choice), count_calls() as calls, pytest.raises(ValueError, match=message):
        model.generate(words(5).to(DEVICE)[None])
    assert not calls
