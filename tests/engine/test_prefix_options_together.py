"""The prefix cache together with chunks, formats of pages, numerics, page sizes and company: in rows in which every two
of these meet, an answer behind pages that another sequence left has the logits that the plain pass gives it.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hf_reference import build, pictures, words
from plain_pass import Step, embed_row, plain_pass, steps_of_batch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from bench.correctness.covering_array import Row, pairwise_rows
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.engine import engine
from vila_triton.engine.sampling import SamplingParams
from vila_triton.models.vila import splice_image_tokens

MODEL = build(gain=3.0)
PARAMS, CFG = MODEL.params, MODEL.vila_config
IMAGES = pictures(MODEL, 2)
NUM_NEW = 2
PROMPT = [*words(7).tolist(), -200, *words(6, seed=3).tolist()]  # 22 positions, the image's 9 from the 7th on
KNOWN = {None: 0, "part of a page": 6, "into the image": 11, "whole pages": 16, "all": 21, "another image": 7}
AXES: dict[str, Sequence[Any]] = {
    "known": tuple(KNOWN),  # how much of the prompt, all but its last token at most, an earlier sequence has left
    "earlier": ("open", "freed"),
    "chunk_size": (None, 1, 5),
    "kv_dtype": (None, "float16", "int8", "int4"),
    "numerics": ("fast", "batch_invariant"),
    "page_size": (16, 4, 1),
    "company": (False, True),
    "pages": ("enough", "as many as needed"),
}


def run(
    row: Row,
    cache: PagedKVCache,
    rows: dict[int, Tensor],
    keys: dict[int, list[int]],
    features: Tensor,
    num_new: int,
    known: int,
) -> dict[int, list[tuple[Tensor, int]]]:
    """The logits [v] and the token of each step of each sequence, the first of which reuses `known` tokens."""
    seen: list[Tensor] = []

    def listen(ids: Any, scores: Any) -> Any:
        seen.append(scores[0])
        return scores

    engine.admit_sequences(cache, keys, num_new)
    assert cache.length(next(iter(rows))) == known
    sampling = SamplingParams(num_new, processors=LogitsProcessorList([listen]))
    answers: dict[int, list[tuple[Tensor, int]]] = {seq: [] for seq in rows}
    for seq, token in engine.generate_tokens(PARAMS, rows, CFG, cache, features, sampling, row["chunk_size"]):
        answers[seq].append((seen.pop(0), token))
    return answers


@pytest.mark.parametrize("row", list(pairwise_rows(AXES)))
@torch.no_grad()
def test_answer_behind_a_cached_prefix_has_the_logits_of_the_plain_pass(row: Row) -> None:
    how = {"page_size": row["page_size"], "kv_dtype": row["kv_dtype"], "numerics": row["numerics"]}
    limit = None if row["pages"] == "enough" else 3 * -(-40 // row["page_size"])
    cache = PagedKVCache(CFG.llm, 0, dtype=MODEL.dtype, max_pages=limit, **how)
    features = engine.encode_images(PARAMS, IMAGES, CFG, row["numerics"])  # [2, 9, e]
    text_keys = [-5 - i for i in range(9)]
    (spliced,) = splice_image_tokens([torch.tensor(PROMPT)], [9], CFG.llm.vocab_size)
    known, earlier_steps = KNOWN[row["known"]], list[Step]()
    if row["known"]:
        other = row["known"] == "another image"
        left = spliced if other else spliced[:known]
        own_keys = engine.prefix_keys(left, [key - 100 for key in text_keys] if other else text_keys)
        own_features = features[1] if other else features[0]
        seq = cache.allocator.add_sequence()
        run(row, cache, {seq: left}, {seq: own_keys}, own_features, 1, known=0)
        earlier_steps = steps_of_batch([len(left)], row["chunk_size"])[0]
        cache.allocator.register_prefix(seq, own_keys)
        if row["earlier"] == "freed":
            cache.allocator.free_sequence(seq)
    seq = cache.allocator.add_sequence()
    rows, keys = {seq: spliced}, {seq: engine.prefix_keys(spliced, text_keys)}
    if row["company"]:
        companion = cache.allocator.add_sequence()
        rows[companion] = words(5, seed=9)
        keys[companion] = rows[companion].tolist()
    lengths = [len(spliced) - known, *([5] if row["company"] else [])]
    admitted = run(row, cache, rows, keys, features[0], NUM_NEW, known)
    steps = [Step(n, step.is_decode) for n, step in cut(earlier_steps, known)]
    steps += steps_of_batch(lengths, row["chunk_size"])[0]
    embeddings = embed_row(PARAMS, CFG, PROMPT, list(IMAGES[:1]))
    for logits, token in admitted[seq]:
        plain = plain_pass(
            PARAMS, CFG, embeddings, steps=steps, kv_dtype=row["kv_dtype"], numerics=row["numerics"]
        ).logits[-1]
        one_rounding = torch.finfo(torch.float32).eps * float(plain.abs().max())
        torch.testing.assert_close(logits, plain.float(), rtol=0, atol=one_rounding)
        assert token == int(plain.argmax())
        embeddings, steps = torch.cat((embeddings, embed_row(PARAMS, CFG, [token]))), [*steps, Step(1, True)]


def cut(steps: Sequence[Step], length: int) -> list[tuple[int, Step]]:
    """The steps of the first tokens, each with the number of these."""
    found = []
    for step in steps:
        n = min(step.num_tokens, length)
        length -= n
        found += [(n, step)] if n else []
    return found
