"""The contract of `VilaLlamaForCausalLM`: every way through a prompt gives the same logits, and nothing is lost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hf_reference import Oracle, build, exact_norms, padded, pictures, words
from torch import Tensor

from vila_triton import use
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.hf.generation import CACHE_KEY
from vila_triton.ops import linear, page_tensors, rms_norm
from vila_triton.registry import Op

MODEL = build()
PICTURE = pictures(MODEL, 1)
IDS = torch.cat([torch.tensor([[1, 5, -200]]), words(1, 20)], dim=1)  # 31 positions: 2, the picture's 9, 20
with torch.no_grad():
    WHOLE = MODEL(IDS, images=PICTURE, use_cache=False).logits


@pytest.fixture(autouse=True)
def fresh() -> None:
    MODEL.cache, MODEL.config.prefill_chunk_size = None, 512


def same(got: Tensor, expected: Tensor = WHOLE) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def state(cache: PagedKVCache) -> list[tuple[int, list[int], Tensor]]:
    """Return of each sequence its length, its pages and the keys in them."""
    return [
        (s.length, list(s.pages), page_tensors(cache.k_pages)[0][:, s.pages].flatten(1, 2)[:, : s.length].clone())
        for s in cache.allocator.sequences.values()
    ]


def unchanged(cache: PagedKVCache, before: list[tuple[int, list[int], Tensor]]) -> bool:
    return (
        all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(state(cache), before, strict=True))
        and len(cache.allocator.free_pages) + len(cache.allocator.ref_counts) == cache.allocator.num_pages
    )


def by_chunks(size: int) -> Tensor:
    MODEL.config.prefill_chunk_size = size
    return MODEL(IDS, images=PICTURE, chunk_prefilling=True).logits


def by_token() -> Tensor:
    parts = [MODEL(IDS[:, :3], start_pos=0, images=PICTURE).logits]
    parts += [MODEL(IDS[:, i : i + 1], start_pos=i + 8).logits for i in range(3, IDS.shape[1])]
    return torch.cat(parts, dim=1)


def by_past() -> Tensor:
    first = MODEL(IDS[:, :9], images=PICTURE)
    rest = MODEL(IDS[:, 9:], past_key_values=first.past_key_values, attention_mask=torch.ones(1, 31))
    return torch.cat((first.logits, rest.logits), dim=1)


def by_rollback() -> Tensor:
    first = MODEL(IDS[:, :9], start_pos=0, images=PICTURE).logits
    MODEL(words(1, 30, seed=9), start_pos=17)
    MODEL(words(1, 1, seed=9), start_pos=[20])
    return torch.cat((first, MODEL(IDS[:, 9:], start_pos=torch.tensor([17])).logits), dim=1)


def by_embeddings() -> Tensor:
    return MODEL(inputs_embeds=torch.stack(Oracle.of(MODEL).embeds(list(IDS), PICTURE))).logits


def after_a_failed_call() -> Tensor:
    with broken(4), pytest.raises(ZeroDivisionError):
        MODEL(IDS, start_pos=0, images=PICTURE)
    return MODEL(IDS, start_pos=0, images=PICTURE).logits


WAYS: dict[str, Callable[[], Tensor]] = {
    **{f"chunks of {n}": lambda n=n: by_chunks(n) for n in (1, 7, 16, 64)},
    **{way.__name__: way for way in (by_token, by_past, by_rollback, by_embeddings, after_a_failed_call)},
    "position_ids": lambda: MODEL(IDS, images=PICTURE, position_ids=torch.arange(31)[None]).logits,
    "5-dimensional images": lambda: MODEL(IDS, images=PICTURE[None]).logits,
    "a list of images": lambda: MODEL(IDS, images=[PICTURE[0]]).logits,
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_logits_equal_for_every_way_through_a_prompt(way: str) -> None:
    same(WAYS[way]())


@pytest.mark.parametrize("chunk", [0, 1, 7, 64])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_a_row_do_not_depend_on_its_batch(side: str, chunk: int) -> None:
    rows = [IDS[0].tolist(), [1, 3, 4], [1, -200, 7], [9]]
    images = pictures(MODEL, 2)
    ids, mask = padded(rows, side)
    MODEL.config.prefill_chunk_size = chunk
    out = MODEL(ids, attention_mask=mask, images=images, chunk_prefilling=bool(chunk))
    cache, queue = out.past_key_values, list(images)
    assert [cache.length(seq) for seq in cache.allocator.sequences] == [31, 3, 11, 1]
    nexts = words(4, 2)  # a step for all four, each after its own past
    more = MODEL(nexts, past_key_values=cache)
    for row, got, following, then in zip(rows, out.logits, nexts, more.logits):
        image = torch.stack([queue.pop(0)]) if -200 in row else None
        alone = MODEL(torch.tensor([[*row, *following]]), images=image).logits[0]
        same(torch.cat((got[: len(alone) - 2], then)), alone)
        assert not got[len(alone) - 2 :].any()  # padding, on the model's own side once pictures are widened


@torch.no_grad()
def test_use_cache_false_reads_the_cache_and_adds_nothing() -> None:
    MODEL(IDS[:, :9], start_pos=0, images=PICTURE)
    own, past = MODEL.cache, MODEL(IDS[:, :9], images=PICTURE).past_key_values
    assert own is not None and own is not past
    for cache, how in ((past, {"past_key_values": past}), (own, {"start_pos": 17})):
        before = state(cache)
        for chunk_prefilling in (False, True, False):
            out = MODEL(IDS[:, 9:], use_cache=False, chunk_prefilling=chunk_prefilling, **how)
            same(out.logits, WHOLE[:, 17:])
            assert out.past_key_values is None and unchanged(cache, before)
        pages = cache.allocator.num_pages
        MODEL(IDS[:, 9:], use_cache=False, **how)
        assert cache.allocator.num_pages == pages  # what the first call borrowed is enough for the next
    assert MODEL.cache is own


@contextmanager
def broken(calls: int, op: Op = rms_norm) -> Iterator[None]:
    """An op that fails after so many calls; in one pass there are 5 norms, and 10 linears before the head."""
    left = iter(range(calls))

    def fail(*args: Any) -> Tensor:
        if next(left, None) is None:
            raise ZeroDivisionError
        return op.reference(*args)

    op.impl("broken")(fail)
    try:
        with use(**{op.name: "broken"}):
            yield
    finally:
        del op.impls["broken"]


IN_CHUNKS = {"chunk_prefilling": True}
FAILURES = [({}, rms_norm, 0), ({}, rms_norm, 3), ({}, linear, 10), ({"use_cache": False}, rms_norm, 3)]


@pytest.mark.parametrize("how, op, calls", [*FAILURES, (IN_CHUNKS, rms_norm, 8), (IN_CHUNKS, linear, 3 * 10)], ids=str)
@torch.no_grad()
def test_failing_kernel_leaves_the_cache_unchanged(how: dict, op: Op, calls: int) -> None:
    MODEL.config.prefill_chunk_size = 5
    past = MODEL(IDS[:, :9], images=PICTURE).past_key_values
    before = state(past)
    with broken(calls, op), pytest.raises(ZeroDivisionError):
        MODEL(IDS[:, 9:], past_key_values=past, **how)
    assert unchanged(past, before)
    same(MODEL(IDS[:, 9:], past_key_values=past).logits, WHOLE[:, 17:])


@torch.no_grad()
def test_hidden_states_and_attentions_equal_hugging_face() -> None:
    rows = [IDS[0].tolist(), [1, 3, 4]]
    ids, mask = padded(rows)
    ours = MODEL(ids, attention_mask=mask, images=PICTURE, output_hidden_states=True, output_attentions=True)
    theirs, places = Oracle.of(MODEL, "eager").run(
        [torch.tensor(row) for row in rows], PICTURE, output_hidden_states=True, output_attentions=True
    )
    for got, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(got, expected * places[..., None], rtol=0, atol=1e-5)  # eager's softmax is float32
    for got, expected in zip(ours.attentions, theirs.attentions, strict=True):
        square = places[:, None, :, None] & places[:, None, None, :]
        torch.testing.assert_close(got, expected * square, rtol=0, atol=1e-6)
    same(ours.logits[:1])


@torch.no_grad()
def test_logits_with_position_ids_equal_hugging_face() -> None:
    ids, positions = words(2, 6), torch.tensor([[0, 2, 3, 5, 8, 13], [0, 0, 1, 1, 2, 2]])
    with exact_norms():
        same(MODEL(ids, position_ids=positions).logits, Oracle.of(MODEL).llm(ids, position_ids=positions).logits)


@torch.no_grad()
def test_logits_to_keep_and_return_dict_shape_the_output() -> None:
    for n in (1, 5, 31, 99):
        for chunk_prefilling in (False, True):
            same(MODEL(IDS, images=PICTURE, logits_to_keep=n, chunk_prefilling=chunk_prefilling).logits, WHOLE[:, -n:])
    loss, logits, cache = MODEL(IDS, images=PICTURE, labels=IDS, return_dict=False)
    same(logits)
    assert loss.ndim == 0 and cache.length(0) == cache.get_seq_length() == 31


@torch.no_grad()
def test_start_pos_0_of_one_row_keeps_what_is_cached_of_the_others() -> None:
    first, then = words(2, 6), words(2, 4, seed=5)
    MODEL(first, start_pos=0)
    own = MODEL.cache
    found = MODEL(then, start_pos=[0, 5]).logits
    assert MODEL.cache is own and own is not None and [own.length(seq) for seq in own.allocator.sequences] == [4, 9]
    same(found[:1], MODEL(then[:1], use_cache=False).logits)
    same(found[1:], MODEL(torch.cat((first[1:, :5], then[1:]), dim=1), use_cache=False).logits[:, 5:])


@torch.no_grad()
def test_values_lie_in_the_pages_of_values() -> None:
    cache, layer = MODEL(IDS[:, 3:])[CACHE_KEY], MODEL.params.llm.layers[0]
    words_in: Any = MODEL.params.llm.embedding[IDS[0, 3:]]
    weight: Any = layer.v.weight
    values = linear(rms_norm(words_in, layer.attention_norm, MODEL.vila_config.llm.rms_norm_eps), weight)  # [t, g·d]
    (pages,) = (s.pages for s in cache.allocator.sequences.values())
    same(page_tensors(cache.v_pages)[0][0, pages].flatten(0, 1)[: len(values)].flatten(1), values)


ONE, TWO = words(1, 5), words(2, 5)
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "start_pos beyond the cache": ({"input_ids": ONE, "start_pos": 40}, "40.* 5 "),
    "start_pos below 0": ({"input_ids": ONE, "start_pos": -1}, "-1.* 5 "),
    "start_pos of another batch": ({"input_ids": TWO, "start_pos": 3}, "2 rows .* 1 "),
    "nothing": ({}, "exactly one of input_ids and inputs_embeds"),
    "both inputs": ({"input_ids": ONE, "inputs_embeds": ONE}, "exactly one of input_ids and inputs_embeds"),
    "images with embeddings": ({"inputs_embeds": torch.zeros(1, 2, 32), "images": PICTURE}, "inputs_embeds"),
    "special_token": ({"input_ids": ONE, "special_token": True}, "special_token"),
    "labels for some": ({"input_ids": ONE, "labels": ONE, "logits_to_keep": 2}, "logits_to_keep"),
    "labels of another shape": ({"input_ids": ONE, "labels": TWO}, r"labels .*\[2, 5\], expected \[1, 5\]"),
    "labels that are no integers": (
        {"input_ids": ONE, "labels": ONE.float()},
        r"labels are torch.float32, expected torch.int64",
    ),
    "a label below 0": (
        {"input_ids": TWO, "labels": TWO.clone().index_fill_(1, torch.tensor(3), -1)},
        "label -1 is not",
    ),
    "a label beyond the vocabulary": (
        {"input_ids": ONE, "labels": ONE + 61},
        r"label \d+ is not in the vocabulary of 61",
    ),
    "ids of one dimension": ({"input_ids": ONE[0]}, r"the input is torch.int64 of shape \[5\], expected"),
    "no ids": ({"input_ids": ONE[:, :0]}, r"the input is torch.int64 of shape \[1, 0\], expected"),
    "embeddings of two dimensions": (
        {"inputs_embeds": torch.zeros(5, 32)},
        r"the input is .* of shape \[5, 32\], expec",
    ),
    "states in chunks": ({"input_ids": ONE, "output_hidden_states": True, "chunk_prefilling": True}, "output_hidden"),
    "weights with a past": ({"input_ids": ONE, "output_attentions": True, "start_pos": 5}, "output_attentions"),
    "too few images": ({"input_ids": torch.tensor([[1, -200, -200]]), "images": PICTURE}, "2 images, but 1 "),
    "too many images": ({"input_ids": ONE, "images": PICTURE}, "0 images, but 1 "),
    "no images": ({"input_ids": torch.tensor([[1, -200]])}, "1 images, but 0 "),
    "images of another size": ({"input_ids": IDS, "images": PICTURE[..., 1:]}, r"images .*20, 19\].* 20, 20\]"),
    "a word that is not one": ({"input_ids": torch.tensor([[1, 61]])}, "61 is not in the vocabulary of 61"),
    "a gap": ({"input_ids": ONE, "attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}, "attention_mask .* gap"),
    "a gap in one row": (
        {"input_ids": TWO, "attention_mask": torch.tensor([[1, 1, 0, 1, 1], [1] * 5])},
        "attention_mask .* gap",
    ),
    "an empty row": ({"input_ids": TWO, "attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "without any token"),
    "a narrow mask": ({"input_ids": ONE, "attention_mask": torch.ones(1, 4)}, r"attention_mask .*\[1, 5\]"),
    "a mask of another past": (
        {"input_ids": ONE, "attention_mask": torch.ones(1, 11), "start_pos": 5},
        r"attention_mask allows \[6\] .* \[5\]",
    ),
    "position_ids of another width": ({"input_ids": ONE, "position_ids": ONE[:, 1:]}, r"position_ids .*\[1, 4\]"),
}


@pytest.mark.parametrize("arguments, message", ERRORS.values(), ids=ERRORS)
@torch.no_grad()
def test_forward_unsupported_argument_raises_and_changes_nothing(arguments: dict, message: str) -> None:
    MODEL(words(1, 5), start_pos=0)
    own = MODEL.cache
    assert own
    before = state(own)
    with pytest.raises(ValueError, match=message):
        MODEL(**arguments)
    assert MODEL.cache is own and unchanged(own, before)


@torch.no_grad()
def test_past_key_values_of_another_type_or_batch_are_refused() -> None:
    past = MODEL(ONE).past_key_values
    with pytest.raises(TypeError, match="past_key_values is a tuple"):
        MODEL(ONE, past_key_values=(1, 2))
    with pytest.raises(ValueError, match=r"2 rows .* 1 "):
        MODEL(TWO, past_key_values=past)
    with pytest.raises(ValueError, match="start_pos"):
        MODEL(ONE, past_key_values=past, start_pos=5)
