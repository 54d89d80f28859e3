"""Decoding on a GPU: a step is captured once, replayed for whatever the buffers hold, and never where it is stale.

Every check compares with the answers of the CPU, which has no graphs. Memory that is given up is filled with NaN, as
whoever reads it later would find anything there.
"""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from hf_reference import build
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from bench import standin
from vila_triton import VilaLlamaForCausalLM
from vila_triton.cache.page_allocator import PageAllocator
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.engine import current_parameters, decode_graphs, decode_loop, engine
from vila_triton.engine.decode_loop import ChosenTokens, DecodeLoop
from vila_triton.engine.sampling import SamplingParams
from vila_triton.ops import PagedKV, rope
from vila_triton.registry import OPS, REFERENCE, count_calls, discover, explicit_choices, use

if standin.is_active():
    from bench.standin.counts import Counts, counting

discover()
MODEL = build(dtype=torch.float32, seed=2, gain=2.0)
SAMPLED = {"do_sample": True, "seed": 3, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
STOP = 60
Tokens = dict[int, list[int]]


@pytest.fixture(scope="module")
def gpu() -> VilaLlamaForCausalLM:
    return deepcopy(MODEL).cuda()  # pyright: ignore[reportCallIssue]


def attend_in_one_call(q: Tensor, cache: PagedKV, seq_lens: Tensor, scale: float, *_: Any) -> Tensor:
    """Decode attention that waits for nothing: over all that the block table has room for."""
    pages: Any = cache.k_pages, cache.v_pages
    k, v = (x[cache.block_table.long()].flatten(1, 2).to(q.dtype) for x in pages)  # [b, t, g, d]
    queries = q.unflatten(1, (k.shape[2], -1))  # [b, g, n, d]
    scores = torch.einsum("bgnd,btgd->bgnt", queries, k) * scale
    is_cached = torch.arange(k.shape[1], device=q.device) < seq_lens[:, None]  # [b, t]
    weights = scores.masked_fill(~is_cached[:, None, None], float("-inf")).softmax(-1).nan_to_num(0)
    v = v.masked_fill(~is_cached[:, :, None, None], 0)
    return torch.einsum("bgnt,btgd->bgnd", weights, v).flatten(1, 2)


def write_row_by_row(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Any, v_pages: Any, slots: Tensor
):
    """`rope_kv_write` that waits for nothing."""
    q, k = (rope.reference(x, cos, sin) for x in (q, k))
    for new, pages in ((k, k_pages), (v, v_pages)):
        flat = pages.view(-1, *pages.shape[2:])
        for i in range(len(slots)):
            slot = slots[i : i + 1].clamp(min=0)
            flat.index_copy_(0, slot, torch.where(slots[i] >= 0, new[i : i + 1], flat.index_select(0, slot)))
    return q, k, k_pages, v_pages


@pytest.fixture(autouse=True, scope="module")
def capturable() -> Iterator[None]:
    """Implementations of the two ops whose references wait for the GPU; interpreted kernels take longer."""
    added = {"decode_attention": attend_in_one_call, "rope_kv_write": write_row_by_row}
    for op, fn in added.items():
        OPS[op].impl("capturable")(fn)
    yield
    for op in added:
        del OPS[op].impls["capturable"]


KERNELS = {
    "cuda": dict.fromkeys(OPS, REFERENCE) | dict.fromkeys(("decode_attention", "rope_kv_write"), "capturable"),
    "cpu": dict.fromkeys(OPS, REFERENCE),
}


class Answers:
    """Prompts of one model in one cache, and their answers as far as they are read."""

    def __init__(self, model: VilaLlamaForCausalLM, rows: int = 1, n: int = 8, pages: int | None = None, **how: Any):
        self.model, self.cache = model, model.new_cache(0)
        self.cache.add_pages(rows * (1 + n // 16) if pages is None else pages)
        self.how, self.tokens, self.n = {"eos_token_id": STOP, **how}, Tokens(), n
        self.tokens_of = self.begin(rows)

    def begin(self, rows: int) -> Any:
        """Another iterator over as many new sequences."""
        new = [self.cache.allocator.add_sequence() for _ in range(rows)]
        prompts = {seq: torch.tensor([1, 5, 7 + seq], device=self.model.device) for seq in new}
        sampling = SamplingParams.from_generate_kwargs(rows, max_new_tokens=self.n, **self.how)
        self.tokens |= {seq: [] for seq in new}
        return engine.generate_tokens(self.model.params, prompts, self.model.vila_config, self.cache, None, sampling)

    def read(self, count: int | None = None, tokens_of: Any = None) -> "Answers":
        """Read so many tokens, or all."""
        with use(**{**KERNELS[self.model.device.type], **explicit_choices()}):
            for i, (seq, token) in enumerate(tokens_of or self.tokens_of, 1):
                self.tokens[seq].append(token)
                if i == count:
                    break
        return self

    def state(self) -> Any:
        """Answers, lengths and pages, and keys and values in them."""
        allocator = self.cache.allocator
        lengths = {seq: s.length for seq, s in allocator.sequences.items()}
        held = [
            torch.cat([x[:, page].cpu() for page in s.pages], 1)[:, : s.length]
            for x in self.cache.tensors
            for s in allocator.sequences.values()
            if s.pages
        ]
        return self.tokens, lengths, {seq: s.pages for seq, s in allocator.sequences.items()}, held


def check_equal(ours: Answers, theirs: Answers) -> None:
    """Both have the same answers, and leave the same in their caches."""
    (*left, held), (*right, expected) = ours.state(), theirs.state()
    assert left == right
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(held, expected, strict=True))


def both(gpu: VilaLlamaForCausalLM, *args: Any, **how: Any) -> tuple[Answers, Answers]:
    return Answers(gpu, *args, **how), Answers(MODEL, *args, **how)


def check_answers(gpu: VilaLlamaForCausalLM, rows: int = 3, **how: Any) -> "Counts":
    with counting() as counts:
        ours, theirs = both(gpu, rows, 24, **how)
        check_equal(ours.read(), theirs.read())
    return counts


@pytest.mark.parametrize("how", [{}, SAMPLED, {"repetition_penalty": 1.3}], ids=["greedy", "sampled", "penalized"])
@pytest.mark.parametrize("rows", [1, 3])
def test_answers_of_replayed_steps_are_those_of_the_cpu(rows: int, how: dict, gpu: VilaLlamaForCausalLM) -> None:
    counts = check_answers(gpu, rows, **how)
    assert counts.captures <= 3 and counts.replays >= 8  # rows leave: buckets of 4, 2 and 1


def test_a_bucket_is_captured_once(gpu: VilaLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "MIN_PAGES", 1)
    ours, theirs = both(gpu, n=36, pages=6, eos_token_id=None)
    with counting() as counts:
        ours.read()
        assert (counts.captures, counts.replays) == (3, 35 - 3)  # 1, 2 and 4 pages, each run once before
        ours.read(tokens_of=ours.begin(1))
    assert (counts.captures, counts.replays) == (3, 35 - 3 + 35)
    check_equal(ours, theirs.read().read(tokens_of=theirs.begin(1)))


def check_steady(gpu: VilaLlamaForCausalLM) -> None:
    """Nothing is waited for and nothing allocated, while the places, the pages and the tokens of rows change."""
    ours = Answers(gpu, 2, 24, eos_token_id=None).read(12)
    with counting() as counts:
        ours.read(24)
    assert not counts.waits and not counts.allocations and not counts.captures
    assert counts.replays == counts.overlapped_waits.total() == 12


def poison(tensors: list[Tensor]) -> None:
    for x in tensors:
        x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)


def check_growth(gpu: VilaLlamaForCausalLM) -> None:
    """The pool grows in the middle of an answer."""
    ours, theirs = both(gpu, 2, 14, eos_token_id=None)
    for answers in (ours, theirs):
        answers.read(12)
        old = answers.cache.tensors
        with answers.cache.lock:
            answers.cache.add_pages(3)
        poison(old)
        answers.read()
    check_equal(ours, theirs)


def check_new_parameters(gpu: VilaLlamaForCausalLM, in_place: bool = False) -> None:
    """Parameters change in the middle of an answer: other memory, or other values in the same."""
    models = [deepcopy(model) for model in (gpu, MODEL)]
    ours, theirs = (Answers(model, 1, 14, eos_token_id=None) for model in models)
    for answers, num_read in ((ours, 6), (theirs, 7)):  # the GPU has begun with one more token than was read
        answers.read(num_read)
        for x in answers.model.parameters():
            old = x.data
            if in_place:
                old.mul_(1.25)
            else:
                x.data = old * 1.25
                poison([old])
        answers.read()
    check_equal(ours, theirs)


def check_adapters(gpu: VilaLlamaForCausalLM) -> None:
    """Adapters come, count for less, are merged and go between the answers over one cache."""
    models = [deepcopy(model) for model in (gpu, MODEL)]
    for model in models:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]), model)
    theirs = dict(models[1].named_parameters())
    for name, x in models[0].named_parameters():
        if "lora_" in name:
            theirs[name].data.normal_(generator=torch.Generator().manual_seed(len(name)))
            x.data.copy_(theirs[name].data)
    answers = [Answers(model.eval(), 1, 12, pages=10, eos_token_id=None) for model in models]

    def change(name: str, *args: Any) -> None:
        for layer in (x for model in models for x in model.modules() if hasattr(x, "lora_A")):
            getattr(layer, name)(*args)

    steps = {"set_scale": ("default", 0.25), "merge": (), "unmerge": (), "enable_adapters": (False,)}
    for name, args in steps.items():
        for x in answers:
            x.read(tokens_of=x.begin(1))
        change(name, *args)
    for x in answers:
        x.read(tokens_of=x.begin(1)).read()
    check_equal(*answers)
    assert len({*map(tuple, answers[0].tokens.values())}) > 3  # they do change the answer


def check_other_kernels(gpu: VilaLlamaForCausalLM) -> None:
    """Kernels are chosen anew in the middle of an answer, and the file of one is imported again."""
    ours, theirs = both(gpu, 1, 24, eos_token_id=None)
    attention = OPS["decode_attention"].impls
    with counting() as counts:
        ours.read(6)
        with use(rms_norm="triton"), count_calls() as calls:
            ours.read(6)
        assert {impl for op, impl in calls if op == "rms_norm"} == {"triton"} and counts.captures == 2
        with count_calls() as calls:
            ours.read(3)
        assert calls["rms_norm", REFERENCE] == 3 * 5 and counts.captures == 2
        before = attention["capturable"]
        try:
            OPS["decode_attention"].impl("capturable")(lambda q, *_: torch.zeros_like(q))
            ours.read(3)
        finally:
            attention["capturable"] = before
    theirs.read(16)
    try:
        OPS["decode_attention"].impl("zero")(lambda q, *_: torch.zeros_like(q))
        with use(decode_attention="zero"):
            theirs.read(3)
    finally:
        del attention["zero"]
    ours.read(2)
    theirs.read(1)
    assert ours.tokens[0][:19] == theirs.tokens[0][:19]


def check_interleaved(gpu: VilaLlamaForCausalLM) -> None:
    """Two iterators of one cache in turns, and a third that is abandoned."""
    ours, theirs = both(gpu, 2, 12, pages=8)
    for answers in (ours, theirs):
        other, abandoned = answers.begin(2), answers.begin(1)
        for turn in range(5):
            answers.read(2).read(3, other)
            if turn < 3:
                answers.read(1, abandoned)
            else:
                abandoned.close()
        answers.read().read(tokens_of=other)
    check_equal(ours, theirs)


def check_stops(gpu: VilaLlamaForCausalLM) -> None:
    """Rows end at different tokens, and what was run for them too early leaves nothing behind."""
    ours, theirs = both(gpu, 3, 24, pages=6)
    for answers in (ours, theirs):
        for _ in range(40):
            answers.read(1)
            tokens = answers.tokens
            for seq, row in answers.cache.allocator.sequences.items():
                keys = [1, 5, 7 + seq, *tokens[seq]]
                answers.cache.allocator.register_prefix(seq, keys[: min(len(keys), row.length)])
        answers.read()
    check_equal(ours, theirs)
    known, expected = (x.cache.allocator.prefix_index.pages for x in (ours, theirs))
    assert {page: known[page] for page in known} == {page: expected[page] for page in expected}


def check_page_boundary(gpu: VilaLlamaForCausalLM) -> None:
    """An answer ends where the next token would have taken a new page."""
    tokens = Answers(MODEL, 1, 14, eos_token_id=None).read().tokens[0]
    assert tokens[-1] not in tokens[:-1]
    ours, theirs = both(gpu, 1, 24, eos_token_id=tokens[-1])
    check_equal(ours.read(), theirs.read())
    assert ours.cache.length(0) == 16 and ours.tokens[0] == tokens


def check_cut(gpu: VilaLlamaForCausalLM) -> None:
    """A sequence is cut to the length that it has, which drops the page of the token on its way; another takes it."""
    ours, theirs = both(gpu, 1, 24, pages=40, eos_token_id=None)
    for answers in (ours, theirs):
        allocator = answers.cache.allocator
        for _ in range(20):
            answers.read(1)
            with answers.cache.lock:
                allocator.truncate(0, allocator[0].length)
                allocator.append({allocator.add_sequence(): 1})
        for seq in list(allocator.sequences)[1:]:
            allocator.free_sequence(seq)
        answers.read()
    check_equal(ours, theirs)


def check_full(gpu: VilaLlamaForCausalLM) -> None:
    """Pages run out: what was chosen is read first, and nothing is lost."""
    ours, theirs = both(gpu, 2, 40, pages=3, eos_token_id=None)
    for answers in (ours, theirs):
        with pytest.raises(RuntimeError, match="more pages of 16 tokens are needed"):
            answers.read()
    check_equal(ours, theirs)


CHECKS: dict[str, Callable[[VilaLlamaForCausalLM], Any]] = {
    "steady": check_steady,
    "growth": check_growth,
    "new parameters": check_new_parameters,
    "new values": lambda gpu: check_new_parameters(gpu, in_place=True),
    "adapters": check_adapters,
    "other kernels": check_other_kernels,
    "interleaved": check_interleaved,
    "stops": check_stops,
    "page boundary": check_page_boundary,
    "cut": check_cut,
    "full": check_full,
}


@pytest.mark.parametrize("name", CHECKS)
def test_no_stale_graph_is_met(name: str, gpu: VilaLlamaForCausalLM) -> None:
    CHECKS[name](gpu)


def test_step_that_waits_for_the_device_is_said_once_and_runs_without_a_graph(gpu: VilaLlamaForCausalLM) -> None:
    ours, theirs = both(gpu, 1, 8)
    with use(decode_attention="reference"), counting() as counts, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours.read()
    assert [str(x.message) for x in said if "not captured" in str(x.message)] == [
        "a decode step is not captured as a graph, and runs without: CUDA error: operation not permitted when stream "
        "is capturing (tolist())"
    ]
    check_equal(ours, theirs.read())
    assert not counts.replays


def test_checked_indices_are_read_at_every_step(gpu: VilaLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILA_TRITON_DEBUG", "1")
    counts = check_answers(gpu, 1)
    assert not counts.captures and counts.waits


def grow_and_keep_graphs(cache: PagedKVCache, n: int) -> None:
    steps = cache.decode_steps
    add_pages(cache, n)
    cache.decode_steps = steps


add_pages = PagedKVCache.add_pages
FAULTS = {
    "a graph outlives the pool": (PagedKVCache, "add_pages", grow_and_keep_graphs, "growth"),
    "a graph outlives the parameters": (current_parameters, "addresses", lambda tensors: [], "new parameters"),
    "a graph outlives the scale of an adapter": (current_parameters, "structure", lambda p: None, "adapters"),
    "a graph is replayed for other kernels": (decode_graphs, "chosen_kernels", lambda *_: None, "other kernels"),
    "another's rows are one's own": (DecodeLoop, "_is_loaded", lambda x, _: x.buffers is not None, "interleaved"),
    "a token is read before it is there": (ChosenTokens, "read", lambda x: x.tokens.tolist(), "stops"),
    "the page of a token run past a stop is kept": (PageAllocator, "truncate", lambda *_: None, "page boundary"),
    "a token run ahead counts at once": (PageAllocator, "unsettle", lambda *_: None, "stops"),
    "pages are sent from memory that is not pinned": (
        decode_loop,
        "pinned",
        lambda x, t, _: torch.tensor(x, dtype=t),
        "steady",
    ),
    "pages are not told to the device": (DecodeLoop, "_update", lambda loop, buffers, rows: None, "stops"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name: str, gpu: VilaLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, fault, check = FAULTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        CHECKS[check](gpu)
