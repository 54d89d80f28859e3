"""Generation: the tokens are Hugging Face's, whatever the batch, the chunks, the interruptions and the turns."""

import string
from collections.abc import Sequence
from typing import Any

import pytest
import sampling_oracle
import torch
from hf_reference import Oracle, build, padded, pictures, words
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TextStreamer

from vila_triton.cache.page_allocator import OutOfPages
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.engine import engine
from vila_triton.engine.sampling import SamplingParams
from vila_triton.models import llama, vila

MODEL = build(dtype=torch.float32, seed=2, gain=2.0)
ORACLE = Oracle.of(MODEL)
ROWS = [[1, 5, -200, 9, 30], [1, 7, 8], [-200, 4, -200, 11, 12, 13, 14, 15], [44]]
IMAGES = pictures(MODEL, 3)
SPELLING = dict(zip(string.ascii_letters + string.digits, range(61)))
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab=SPELLING, merges=[])))
TOKENIZER.backend_tokenizer.decoder = decoders.Fuse()
NEVER = -1  # a stop token that no word is


def spell(tokens: Sequence[int]) -> str:
    return "".join(list(SPELLING)[token] for token in tokens)


def generate(rows: list[list[int]], images: Tensor | None = None, side: str = "right", **how: Any) -> list[list[int]]:
    ids, mask = padded(rows, side)
    how = {"max_new_tokens": 12, "eos_token_id": NEVER, **how}
    return MODEL.generate(ids, images=images, attention_mask=mask, **how).tolist()


def theirs(row: list[int], images: Tensor | None = None, **how: Any) -> list[int]:
    embeds = torch.stack(ORACLE.embeds([torch.tensor(row)], images))
    how = {"max_new_tokens": 12, "eos_token_id": NEVER, "pad_token_id": 0, "do_sample": False, **how}
    return ORACLE.llm.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **how)[0].tolist()


with torch.no_grad():
    SPLIT = IMAGES.split([row.count(-200) for row in ROWS])
    ANSWERS = [theirs(row, images if len(images) else None) for row, images in zip(ROWS, SPLIT)]


@pytest.mark.parametrize("how", [{}, {"side": "left"}, {"chunk_prefilling": True}], ids=str)
def test_greedy_answers_equal_hugging_face(how: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODEL.config, "prefill_chunk_size", 4)
    assert min(len(set(answer)) for answer in ANSWERS) > 8  # not one word again and again
    assert generate(ROWS, IMAGES, **how) == ANSWERS


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 3.0, "top_k": 7},
        {"top_p": 0.6},
        {"top_k": 3, "top_p": 0.8, "temperature": 1.5, "repetition_penalty": 1.3},
        {"repetition_penalty": 4.0, "temperature": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_answers_equal_hugging_face_with_the_same_draws(
    how: dict, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS[1] + ANSWERS[1]
    monkeypatch.setattr(torch, "multinomial", sampling_oracle.multinomial(seed))
    expected = ORACLE.llm.generate(
        torch.tensor([row]),
        max_new_tokens=12,
        do_sample=True,
        eos_token_id=NEVER,
        pad_token_id=0,
        **{"top_k": 0, **how},
    )[0, len(row) :].tolist()
    assert generate([row], do_sample=True, seed=seed, **how) == [expected]


def test_seeded_answer_does_not_depend_on_the_batch() -> None:
    alone = [
        generate([row], images if len(images) else None, do_sample=True, seed=[seed])[0]
        for row, images, seed in zip(ROWS, SPLIT, (5, 6, 7, 8))
    ]
    assert generate(ROWS, IMAGES, do_sample=True, seed=5) == alone
    assert generate(ROWS, IMAGES, do_sample=True, seed=[5, 6, 7, 8]) == alone
    others = generate(ROWS, IMAGES, do_sample=True, seed=[9, 6, 7, 8])
    assert others[1:] == alone[1:] and others[0] != alone[0]
    stops = [alone[0][3], alone[2][6]]  # rows end at different tokens, and others go on
    ends = [min([answer.index(stop) + 1 for stop in stops if stop in answer], default=12) for answer in alone]
    assert len({*ends}) > 2
    ended = generate(ROWS, IMAGES, do_sample=True, seed=5, eos_token_id=stops, pad_token_id=0)
    assert ended == [answer[:end] + [0] * (max(ends) - end) for answer, end in zip(alone, ends)]


def test_unseeded_answers_differ_and_torch_manual_seed_repeats_them() -> None:
    drawn = [generate(ROWS[1:2] * 2, do_sample=True) for _ in range(2)]
    assert drawn[0] != drawn[1] and drawn[0][0] != drawn[0][1]
    again = []
    for _ in range(2):
        torch.manual_seed(3)
        again.append(generate(ROWS[1:2], do_sample=True))
    assert again[0] == again[1]
    assert (
        SamplingParams.from_generate_kwargs(2, do_sample=True).seeds
        != SamplingParams.from_generate_kwargs(2, do_sample=True).seeds
    )
    assert SamplingParams.from_generate_kwargs(2).seeds is None


@pytest.mark.parametrize(
    "how",
    [{}, {"do_sample": True}, {"logits_processor": [lambda ids, scores: scores]}],
    ids=["greedy", "sampled", "open loop"],
)
def test_scores_that_are_no_numbers_are_an_error(how: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llama.logits
    monkeypatch.setattr(llama, "logits", lambda p, hidden: whole(p, hidden).where(hidden[:, :1].isnan(), float("nan")))
    with pytest.raises(RuntimeError, match="sequence 0: the model's scores of the next token are not finite numbers"):
        generate(ROWS[1:2], **how)


def test_answer_ends_with_stop_token_and_is_padded_with_it() -> None:
    stop = next(token for i, token in enumerate(ANSWERS[0][2:], 2) if token not in ANSWERS[0][:i])
    expected = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in ANSWERS]
    longest = max(map(len, expected))
    assert len(expected[0]) < longest
    for eos in (stop, [stop, NEVER]):
        assert generate(ROWS, IMAGES, eos_token_id=eos) == [a + [stop] * (longest - len(a)) for a in expected]


def test_answer_ends_with_stop_string() -> None:
    answer = ANSWERS[1]
    stop = spell(answer[4:6])
    assert spell(answer).index(stop) == 4
    for strings in (stop, ["never", stop]):
        assert generate(ROWS[1:2], stop_strings=strings, tokenizer=TOKENIZER) == [answer[:6]]


@pytest.mark.parametrize("loop", ["engine", "transformers"])
def test_answer_that_no_token_stops_is_padded_with_0(loop: str) -> None:
    stop = spell(ANSWERS[1][4:6])
    assert [stop in spell(answer) for answer in ANSWERS] == [False, True, False, False]
    found = generate(ROWS, IMAGES, eos_token_id=None, stop_strings=stop, tokenizer=TOKENIZER, loop=loop)
    assert found == [ANSWERS[0], ANSWERS[1][:6] + [0] * 6, *ANSWERS[2:]]


@pytest.mark.parametrize("n", [1, 5])
def test_answer_has_at_most_max_new_tokens(n: int) -> None:
    assert generate(ROWS, IMAGES, max_new_tokens=n) == [answer[:n] for answer in ANSWERS]


@pytest.mark.parametrize(
    "how, message",
    [
        ({"temperature": 0.5}, "do_sample"),
        ({"top_k": 5}, "do_sample"),
        ({"top_p": 0.5}, "do_sample"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop_strings": "x"}, "tokenizer"),
        ({"do_sample": True, "seed": [1, 2, 3]}, "3 seeds for 2 prompts"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"streamer": TextStreamer(TOKENIZER)}, "streamer takes one prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_contradicting_sampling_arguments_are_refused(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate([[1, 2], [3]], **how)


def test_streamer_receives_the_text_of_the_answer() -> None:
    class Heard(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    for skip_prompt in (True, False):
        heard = Heard(TOKENIZER, skip_prompt=skip_prompt)
        generate(ROWS[:1], IMAGES[:1], streamer=heard)
        assert heard.text == ("" if skip_prompt else spell([1, 5, 9, 30])) + spell(ANSWERS[0])


def conversation(pages: int = 40) -> tuple[PagedKVCache, dict[int, Tensor], Any]:
    """A cache of small pages, the rows of the first two prompts in it by sequence, and what `stream` needs besides."""
    cache = PagedKVCache(MODEL.vila_config.llm, pages, page_size=4, dtype=MODEL.dtype)
    rows = vila.splice_image_tokens([torch.tensor(row) for row in ROWS[:2]], [9], 61)
    features = engine.encode_images(MODEL.params, IMAGES[:1], MODEL.vila_config).flatten(0, 1).detach()
    return cache, {cache.allocator.add_sequence(): row for row in rows}, features


def answers(cache: PagedKVCache, rows: dict[int, Tensor], features: Any, n: int, chunk: int | None = None) -> Any:
    found: dict[int, list[int]] = {seq: [] for seq in rows}
    for seq, token in engine.generate_tokens(
        MODEL.params,
        rows,
        MODEL.vila_config,
        cache,
        features,
        SamplingParams.from_generate_kwargs(len(rows), max_new_tokens=n),
        chunk,
    ):
        found[seq].append(token)
    return found


def test_generate_tokens_yields_tokens_of_generate_and_caches_all_but_the_last() -> None:
    cache, rows, features = conversation()
    assert list(answers(cache, rows, features, 12, chunk=5).values()) == ANSWERS[:2]
    assert [cache.length(seq) for seq in rows] == [13 + 11, 3 + 11]


def test_second_turn_runs_only_new_tokens_and_answers_like_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def counted(p: Any, x: Tensor, *args: Any) -> Tensor:
        ran.append(len(x))
        return llama_llama(p, x, *args)

    llama_llama = llama.forward
    monkeypatch.setattr(llama, "forward", counted)
    cache, rows, features = conversation()
    first = answers(cache, rows, features, 6)
    assert ran == [13 + 3, 2, 2, 2, 2, 2]
    ran.clear()
    question = words(5, seed=8)
    longer = {seq: torch.cat((row, torch.tensor(first[seq]), question)) for seq, row in rows.items()}
    second = answers(cache, longer, features, 6)
    assert ran == [2 * (1 + 5), 2, 2, 2, 2, 2]  # the last word of the first answer, and the question
    fresh, same_ids, _ = conversation()
    assert second == answers(fresh, dict(zip(same_ids, longer.values())), features, 6)
    with pytest.raises(ValueError, match="nothing is new"):
        answers(cache, {0: longer[0]}, features, 1)


def test_generate_tokens_in_a_full_cache_raises_and_loses_nothing() -> None:
    cache, rows, features = conversation(pages=8)  # 13 + 3 tokens take 5 of them
    heard: dict[int, list[int]] = {seq: [] for seq in rows}
    how = SamplingParams.from_generate_kwargs(2, max_new_tokens=12)
    with pytest.raises(OutOfPages, match="1 more pages of 4 tokens are needed, but 0 of 8 are free"):
        for seq, token in engine.generate_tokens(MODEL.params, rows, MODEL.vila_config, cache, features, how):
            heard[seq].append(token)
    ends = {seq: len(row) + len(heard[seq]) - 1 for seq, row in rows.items()}
    assert {seq: cache.length(seq) for seq in rows} == ends
    kept, freed = rows
    cache.allocator.free_sequence(freed)
    so_far = torch.cat((rows[kept], torch.tensor(heard[kept])))
    rest = answers(cache, {kept: so_far}, features, 3)[kept]
    assert heard[kept] + rest == ANSWERS[0][: len(heard[kept]) + 3]


def test_prompt_beyond_the_page_limit_leaves_the_cache_empty() -> None:
    cache, rows, features = conversation(pages=4)
    for chunk in (None, 4):
        with pytest.raises(OutOfPages):
            answers(cache, rows, features, 1, chunk)
        assert [cache.length(seq) for seq in rows] == [0, 0] and len(cache.allocator.free_pages) == 4
