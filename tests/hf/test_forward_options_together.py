"""`forward`'s options together: in rows in which every two values of different options meet, each sequence of the batch
has what the plain pass gives it alone; two options that exclude each other are one error that names both.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hf_reference import LLM, build, pictures, words
from plain_pass import PlainResult, embed_row, float64_budget, plain_pass, steps_of_batch
from torch import Tensor

from bench.correctness.covering_array import Row, pairwise_rows
from vila_triton import use
from vila_triton.hf.generation import CACHE_KEY
from vila_triton.registry import OPS, count_calls

MODEL = build(gain=2.0)
PARAMS, CFG = MODEL.params, MODEL.vila_config
IMAGES = pictures(MODEL, 3)
TOKENS_PER_IMAGE = 9
CONTEXT_LENS = (5, 3, 7)
DISTANCES = torch.tensor([1, 1, 3, 1, 2, 5, 1])  # between positions that are given
MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
}
LENGTHS = {"one": (12,), "equal": (7, 7), "ragged": (9, 1, 4), "single tokens": (1, 1)}
AXES: dict[str, Sequence[Any]] = {
    "batch": tuple(LENGTHS),
    "inputs": ("input_ids", "inputs_embeds"),
    "images": (None, "one", "several", "list"),
    "padding": (None, "right", "left", "both"),
    "padding_side": ("right", "left"),  # of the tokenizer: where padding goes when images are widened
    "mask_of_past": (False, True),
    "position_ids": (None, "usual", "others", "others for all rows"),
    "past": (None, "past_key_values", "start_pos=0", "start_pos", "start_pos, rolled back"),
    "use_cache": (None, True, False, "config says no"),
    "chunk_size": (None, 1, 3, 64),
    "labels": (False, True),
    "logits_to_keep": (0, 1, 4, 99),
    "output_hidden_states": (None, True, "config says yes"),
    "output_attentions": (None, True, "config says yes"),
    "return_dict": (None, True, False, "config says no"),
    "kv_dtype": (None, "float16", "int8", "int4"),
    "page_size": (16, 4),
    "numerics": ("fast", "batch_invariant"),
    "kernels": ("default", "reference"),
    "mode": tuple(MODES),
}
with torch.no_grad():
    ROW = [1, 5, -200, *words(20).tolist()]
    BUDGET = float64_budget(PARAMS, CFG, [embed_row(PARAMS, CFG, ROW, list(IMAGES[:1]))])

FORBIDDEN: dict[tuple[str, str], str] = {
    ("images", "inputs_embeds"): "images go into input_ids; inputs_embeds have them already",
    ("labels", "logits_to_keep"): "labels need all logits, but logits_to_keep is set",
    ("output_hidden_states", "chunk_prefilling"): "output_hidden_states needs one pass; chunk_prefilling makes many",
    ("output_attentions", "chunk_prefilling"): "output_attentions needs one pass; chunk_prefilling makes many",
    ("output_attentions", "past_key_values"): "output_attentions needs the whole sequence in one pass, but "
    "past_key_values or start_pos continue one",
    ("output_attentions", "start_pos"): "output_attentions needs the whole sequence in one pass, but past_key_values "
    "or start_pos continue one",
    ("past_key_values", "start_pos"): "start_pos continues the model's own cache; do not give past_key_values too",
    ("input_ids", "inputs_embeds"): "exactly one of input_ids and inputs_embeds is needed",
}


def options_of(row: Row) -> set[str]:
    """The arguments that a row, which may lack axes, gives `forward`."""
    options = {row.get("inputs"), "start_pos" if row.get("past") in AXES["past"][3:] else row.get("past")}
    options |= {name for name in ("images", "labels", "output_hidden_states", "output_attentions") if row.get(name)}
    options |= {"logits_to_keep"} if row.get("logits_to_keep") else set()
    return options | ({"chunk_prefilling"} if row.get("chunk_size") else set())


def is_valid(row: Row) -> bool:
    """True unless the row gives two options of `FORBIDDEN`, or what there is none of."""
    if row.get("batch") == "ragged" and "padding" in row and row["padding"] is None:
        return False  # rows of several lengths are padded
    if row.get("kernels") == "reference" and row.get("numerics") == "batch_invariant":
        return False  # `use` may then choose batch-invariant implementations only
    return not any(options_of(row).issuperset(pair) for pair in FORBIDDEN)


@dataclass
class Case:
    """The batch of a row: the ids of each sequence [t] with its images, and the ids that are cached before them."""

    row: Row
    ids: list[list[int]]
    images: list[list[Tensor]]
    context_lens: list[int]
    contexts: list[list[int]]

    @classmethod
    def of(cls, row: Row) -> "Case":
        ids = [words(n, seed=i).tolist() for i, n in enumerate(LENGTHS[row["batch"]])]
        if row["images"]:
            ids[0][len(ids[0]) // 3] = -200
        if row["images"] in ("several", "list"):
            ids[0][-1] = ids[-1][len(ids[-1]) // 2] = -200
        left = list(IMAGES)
        images = [[left.pop(0) for token in tokens if token == -200] for tokens in ids]
        contexts = [words(n + 4, seed=10 + n).tolist() for n in CONTEXT_LENS[: len(ids)]]
        has_past = row["past"] not in (None, "start_pos=0")
        return cls(row, ids, images, [n if has_past else 0 for n in CONTEXT_LENS[: len(ids)]], contexts)

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) + (TOKENS_PER_IMAGE - 1) * tokens.count(-200) for tokens in self.ids]

    def place(self, lengths: Sequence[int]) -> Tensor:
        """The mask [b, t] of where the row's padding puts sequences of these lengths."""
        if self.row["padding"] is None:
            return torch.ones(len(lengths), max(lengths), dtype=torch.bool)
        width = max(lengths) + 2
        begins = [{"right": 0, "both": 1, "left": width - n}[self.row["padding"]] for n in lengths]
        return torch.tensor([[begin <= i < begin + n for i in range(width)] for begin, n in zip(begins, lengths)])

    def output_mask(self) -> Tensor:
        """The mask [b, t'] of the sequences in the outputs: as they were given, or where widened images move them."""
        if not self.row["images"]:
            return self.place(self.lengths)
        columns, lengths = torch.arange(max(self.lengths)), torch.tensor(self.lengths)[:, None]
        return columns < lengths if self.row["padding_side"] == "right" else columns >= max(self.lengths) - lengths

    def positions(self) -> list[Tensor]:
        """The positions of each sequence [t']."""
        if self.row["position_ids"] in (None, "usual"):
            return [torch.arange(start, start + n) for start, n in zip(self.context_lens, self.lengths)]
        rows = DISTANCES.repeat(len(self.ids), 9)
        if self.row["position_ids"] == "others":
            rows = torch.stack([row.roll(i) for i, row in enumerate(rows)])
        return [row[mask] for row, mask in zip(rows.cumsum(1)[:, : self.output_mask().shape[1]], self.output_mask())]

    def labels(self) -> list[Tensor]:
        """Labels of each sequence [t], some of which do not count; those at images do not either."""
        rows = [words(len(tokens), seed=20 + i) for i, tokens in enumerate(self.ids)]
        return [torch.where(torch.arange(len(row)) % 4 == 2, -100, row) for row in rows]

    def wide_labels(self) -> list[Tensor]:
        """Labels of each sequence [t'], with those of images."""
        pairs = [list(zip(tokens, labels.tolist())) for tokens, labels in zip(self.ids, self.labels())]
        wide = lambda token, label: [-100] * TOKENS_PER_IMAGE if token == -200 else [label]  # noqa: E731
        return [torch.tensor([x for token, label in row for x in wide(token, label)]) for row in pairs]

    def arguments(self) -> dict[str, Any]:
        """The arguments of `forward` that do not continue a cache."""
        row, mask = self.row, self.place([len(tokens) for tokens in self.ids])
        given: dict[str, Any] = {"logits_to_keep": row["logits_to_keep"], "chunk_prefilling": bool(row["chunk_size"])}
        # Padding holds what would be found out if it were looked at.
        ids = fill(torch.full(mask.shape, -200), mask, [torch.tensor(tokens) for tokens in self.ids])
        if row["inputs"] == "input_ids":
            given["input_ids"] = ids
        else:
            nowhere = torch.full((*mask.shape, CFG.llm.hidden_size), float("nan"), dtype=MODEL.dtype)
            given["inputs_embeds"] = fill(nowhere, mask, [embed_row(PARAMS, CFG, tokens) for tokens in self.ids])
        if row["images"]:
            images = [image for images in self.images for image in images]
            given["images"] = images if row["images"] == "list" else torch.stack(images)
        if row["padding"]:
            given["attention_mask"] = mask.long()
            if row["mask_of_past"]:
                longest = max(self.context_lens)
                past = [[0] * (longest - n) + [1] * n for n in self.context_lens]
                given["attention_mask"] = torch.cat((torch.tensor(past).long(), mask.long()), dim=1)
        if row["position_ids"]:
            given["position_ids"] = fill(torch.full(self.output_mask().shape, -1), self.output_mask(), self.positions())
            if row["position_ids"] == "others for all rows":
                given["position_ids"] = DISTANCES.repeat(9).cumsum(0)[None, : self.output_mask().shape[1]]
        if row["labels"]:
            given["labels"] = fill(torch.full(mask.shape, 3), mask, self.labels())
        for name in ("use_cache", "output_hidden_states", "output_attentions", "return_dict"):
            if row[name] in (True, False):
                given[name] = row[name]
        return given

    def run(self) -> tuple[Any, list[int], list[int]]:
        """Run `forward` -> its output, and the lengths of its cache before and after."""
        past: dict[str, Any] = {}
        if self.row["past"]:
            extra = 4 if self.row["past"] == "start_pos, rolled back" else 0
            lengths = [n + extra for n in CONTEXT_LENS[: len(self.ids)]]
            mask = torch.tensor([[i < n for i in range(max(lengths))] for n in lengths])
            rows = [torch.tensor(context[:n]) for context, n in zip(self.contexts, lengths)]
            how = {} if self.row["past"] == "past_key_values" else {"start_pos": 0}
            first = MODEL(fill(torch.zeros(mask.shape).long(), mask, rows), attention_mask=mask, use_cache=True, **how)
            if self.row["past"] == "past_key_values":
                past["past_key_values"] = first[CACHE_KEY] if isinstance(first, dict) else first[1]
            else:
                past["start_pos"] = {"start_pos=0": 0}.get(self.row["past"], self.context_lens)
        cache = past.get("past_key_values", MODEL.cache)
        before = lengths_of(cache)
        output = MODEL(**self.arguments(), **past)
        after = lengths_of(past.get("past_key_values", MODEL.cache))
        return output, before, after

    def expected(self) -> list[PlainResult]:
        """The plain pass of each sequence, of its new tokens only."""
        row = self.row
        kept = row["use_cache"] in (None, True) or any(self.context_lens) or row["chunk_size"]
        new_steps = steps_of_batch(self.lengths, row["chunk_size"], in_pages=bool(kept))
        results = []
        for tokens, images, context, n, positions, steps in zip(
            self.ids, self.images, self.contexts, self.context_lens, self.positions(), new_steps
        ):
            embeddings = embed_row(PARAMS, CFG, [*context[:n], *tokens], images)
            plain = plain_pass(
                PARAMS,
                CFG,
                embeddings,
                positions=torch.cat((torch.arange(n), positions)),
                steps=[*(steps_of_batch([n], None)[0] if n else []), *steps],
                kv_dtype=row["kv_dtype"],
                numerics=row["numerics"],
            )
            results.append(
                PlainResult(
                    plain.logits[n:],
                    [x[n:] for x in plain.hidden_states],
                    [x[:, n:, n:] for x in plain.attentions],
                )
            )
        return results


def lengths_of(cache: Any) -> list[int]:
    return [s.length for s in cache.allocator.sequences.values()] if cache else []


def fill(background: Tensor, mask: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The background [b, t, ...] with the rows [t, ...] where the mask [b, t] says."""
    for i, row in enumerate(rows):
        background[i, mask[i]] = row
    return background


def pad_square(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Attention weights [h, t, t] of each sequence in a batch [b, h, t', t'] of zeros."""
    out = rows[0].new_zeros(len(rows), len(rows[0]), *mask.shape[1:] * 2)
    for i, row in enumerate(rows):
        (places,) = mask[i].nonzero(as_tuple=True)
        out[i, :, places[:, None], places] = row
    return out


def mean_loss(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """The mean of -log p(label) over all labels that count, each under the logits one position before it."""
    losses = [
        -row[i - 1].log_softmax(0)[label]
        for row, row_labels in zip(logits, labels)
        for i, label in enumerate(row_labels.tolist())
        if i and label != -100
    ]
    return torch.stack(losses).mean()


def close(found: Tensor, expected: Tensor) -> None:
    """The same shape and numbers, up to `BUDGET`."""
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=BUDGET)


@pytest.mark.parametrize("row", list(pairwise_rows(AXES, is_valid=is_valid)))
def test_each_sequence_has_what_the_plain_pass_gives_it_alone(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.of(row)
    MODEL.cache = None
    monkeypatch.setitem(MODEL.padding_config, "padding_side", row["padding_side"])
    config = {
        "page_size": row["page_size"],
        "kv_dtype": row["kv_dtype"],
        "attention_numerics": row["numerics"],
        "prefill_chunk_size": row["chunk_size"] or 2,  # which counts in no call without `chunk_prefilling`
        "use_cache": row["use_cache"] != "config says no",
        "return_dict": row["return_dict"] != "config says no",
        "output_hidden_states": row["output_hidden_states"] == "config says yes",
        "output_attentions": False,
    }
    for name, value in config.items():
        monkeypatch.setattr(MODEL.config, name, value, raising=False)
    with ExitStack() as stack:
        stack.enter_context(MODES[row["mode"]]())
        if row["kernels"] == "reference":
            stack.enter_context(use(**dict.fromkeys(OPS, "reference")))
        if row["output_attentions"] == "config says yes":
            MODEL.config.output_attentions = True
        if row["labels"] and not any(x != -100 for labels in case.wide_labels() for x in labels[1:].tolist()):
            with pytest.raises(ValueError, match="labels: all are -100 behind the first of each sequence"):
                case.run()
            return
        output, before, after = case.run()
    with torch.no_grad():
        expected = case.expected()

    mask, keep = case.output_mask(), row["logits_to_keep"]
    uses_cache = row["use_cache"] in (None, True)
    fields = {"loss": row["labels"], "logits": True, CACHE_KEY: uses_cache}
    fields |= {name: row[f"output_{name}"] for name in ("hidden_states", "attentions")}
    names = [name for name, given in fields.items() if given]
    as_tuple = row["return_dict"] in (False, "config says no")
    assert isinstance(output, tuple) == as_tuple
    found = dict(zip(names, output, strict=True)) if as_tuple else dict(output)
    assert list(found) == names

    logits = fill(torch.zeros(*mask.shape, LLM["vocab_size"]).double(), mask, [x.logits for x in expected])
    close(found["logits"], logits[:, -keep:])
    if row["labels"]:
        close(found["loss"], mean_loss([x.logits for x in expected], case.wide_labels()))
    if row["output_hidden_states"]:
        assert len(found["hidden_states"]) == CFG.llm.num_hidden_layers + 1
        for i, states in enumerate(found["hidden_states"]):
            empty = torch.zeros(*mask.shape, CFG.llm.hidden_size).double()
            close(states, fill(empty, mask, [x.hidden_states[i] for x in expected]))
    if row["output_attentions"]:
        assert len(found["attentions"]) == CFG.llm.num_hidden_layers
        for i, weights in enumerate(found["attentions"]):
            close(weights, pad_square([x.attentions[i] for x in expected], mask))
    longer = [start + n for start, n in zip(case.context_lens, case.lengths)]
    if uses_cache:
        assert lengths_of(found[CACHE_KEY]) == longer
        assert found[CACHE_KEY].allocator.page_size == row["page_size"]
    assert after == (longer if uses_cache and row["past"] else before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 20))
def test_other_rows_too(seed: int) -> None:
    for row in pairwise_rows(AXES, seed, is_valid):
        with pytest.MonkeyPatch.context() as monkeypatch:
            test_each_sequence_has_what_the_plain_pass_gives_it_alone(row, monkeypatch)


@pytest.mark.parametrize("pair", FORBIDDEN, ids=" and ".join)
@torch.no_grad()
def test_two_options_that_exclude_each_other_are_refused_before_anything_runs(pair: tuple[str, str]) -> None:
    MODEL.cache = None
    ids = words(1, 6)
    options: dict[str, Any] = {
        "input_ids": ids,
        "inputs_embeds": torch.zeros(1, 6, CFG.llm.hidden_size).double(),
        "images": IMAGES[:1],
        "labels": ids,
        "logits_to_keep": 1,
        "output_hidden_states": True,
        "output_attentions": True,
        "chunk_prefilling": True,
        "past_key_values": MODEL(ids, start_pos=0)[CACHE_KEY],
        "start_pos": 3,
    }
    given = {name: options[name] for name in pair}
    if not {"input_ids", "inputs_embeds"} & given.keys():
        given |= {"input_ids": torch.tensor([[1, -200, 5]]), "images": IMAGES[:1]}
    with count_calls() as calls, pytest.raises(ValueError) as error:
        MODEL(**given)
    assert FORBIDDEN[pair] in str(error.value) and all(name in str(error.value) for name in pair)
    assert not calls and MODEL.cache is not None and lengths_of(MODEL.cache) == [6]
