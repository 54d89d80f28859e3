"""Arguments of `generate` that say how tokens are chosen and when to stop, and the choice of the next token.

The choice runs on the device of the logits: nothing waits for the host, and no shape depends on values. What a row (one
sequence of a batch) chooses depends on its logits, settings and seed and on the number of tokens it has drawn, bit for
bit: sums of probabilities are sums of integers, which no order changes.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ..checkpoints.generation_config import ARGUMENT_LIMITS
from ..limits import SEED
from .draws import seed_tensor, uniform
from .stopping import StopStrings

NEEDS_SAMPLING = "temperature, top_k and top_p need do_sample=True: else the likeliest token is taken"
NO_TOKEN = -1
PROBABILITY_BITS = 62  # probabilities are added as multiples of 2^-62; all of a row are below 2 together
ALIGNED_ROWS = 4  # float32 numbers in the 16 bytes that a GPU's softmax reads at once


@dataclass(frozen=True)
class SamplingParams:
    """The choice of the tokens of an answer, and when it ends; names as in transformers' `generate`.

    seeds: one for each sequence, or None for greedy decoding. processors and criteria: transformers' objects of the
    caller, which look at one sequence at a time.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seeds: Sequence[int] | None = None
    stop_token_ids: Sequence[int] = ()
    stop_strings: StopStrings | None = None
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)

    @classmethod
    def from_generate_kwargs(
        cls,
        batch_size: int,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: object = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
    ) -> "SamplingParams":
        """Build the parameters from arguments named as in transformers' `generate`.

        Decoding is greedy unless `do_sample`. Sequence i draws with seed + i, or with seed[i]; without a seed from an
        unpredictable one, which is then in `seeds`. Errors: ValueError naming the argument.
        """
        check_sampling_arguments(locals())
        if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
            raise ValueError(NEEDS_SAMPLING)
        seeds = None
        if do_sample:
            seed = secrets.randbits(32) if seed is None else seed
            seeds = [seed + i for i in range(batch_size)] if isinstance(seed, int) else list(seed)
            if len(seeds) != batch_size:
                raise ValueError(f"{len(seeds)} seeds for {batch_size} prompts")
        eos = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
        return cls(
            max_new_tokens,
            float(temperature),
            top_k,
            top_p,
            float(repetition_penalty),
            seeds,
            stop_token_ids=tuple(int(token) for token in eos),
            stop_strings=None if stop_strings is None else StopStrings(tokenizer, stop_strings),
            processors=LogitsProcessorList(logits_processor or []),
            criteria=StoppingCriteriaList(stopping_criteria or []),
        )

    @property
    def penalizes(self) -> bool:
        """True if `choose_tokens` needs the tokens that were seen."""
        return self.repetition_penalty != 1.0

    @property
    def needs_scores(self) -> str:
        """The options for which scores must come to the host at every step, which no static step does; "" if none does.

        Whatever else is in here (the choice, seeds, the repetition penalty, stop tokens, stop strings, the length) a
        static step serves.
        """
        names = {"logits_processor": self.processors, "stopping_criteria": self.criteria}
        return " and ".join(name for name, given in names.items() if given)

    def rows(self, batch_size: int, device: torch.device | str) -> "SamplingRows":
        """The settings of each sequence, on the device. Errors: ValueError for another number of seeds."""
        if self.seeds is not None and len(self.seeds) != batch_size:
            raise ValueError(f"{len(self.seeds)} seeds for {batch_size} sequences")

        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((batch_size,), value, dtype=dtype, device=device)

        top_p = 1.0 if self.top_p is None else float(self.top_p)
        return SamplingRows(
            do_sample=column(self.seeds is not None, torch.bool),
            temperature=column(self.temperature, torch.float32),
            top_k=column(self.top_k or 0, torch.int64),
            top_p=column(top_p, torch.float64),
            repetition_penalty=column(self.repetition_penalty, torch.float32),
            seeds=seed_tensor(self.seeds or [0] * batch_size, device),
            samples=self.seeds is not None,
            largest_top_k=self.top_k or 0,
            uses_top_p=top_p < 1,
        )

    def has_ended(self, text_ids: list[int], scores: Tensor | None = None) -> bool:
        """Return whether the last of these token ids ends the answer, other than by its length.

        scores: [v], those that it was chosen by; criteria of the caller take them.
        """
        if text_ids[-1] in self.stop_token_ids:
            return True
        if self.stop_strings is not None and self.stop_strings.completes_stop_string(text_ids):
            return True
        if not self.criteria:
            return False
        assert scores is not None
        ids: Any = torch.tensor([text_ids], device=scores.device)
        return bool(self.criteria(ids, scores[None]).any())  # pyright: ignore[reportArgumentType]


def check_sampling_arguments(options: Mapping[str, Any]) -> None:
    """Errors: ValueError naming an argument of `SamplingParams.from_generate_kwargs` that is out of range."""
    for name, limits in ARGUMENT_LIMITS.items():
        if options.get(name) is not None:
            limits.validate(name, options[name])
    seed = options.get("seed")
    for value in seed if isinstance(seed, Sequence) else () if seed is None else (seed,):
        SEED.validate("seed", value)


@dataclass(frozen=True)
class SamplingRows:
    """The settings by which each row of a batch chooses its tokens; names as in transformers' `generate`.

    The numbers that are no tensors say what is computed at all, and hold for all rows; no result depends on them.
    """

    do_sample: Tensor  # [b] bool; greedy where False
    temperature: Tensor  # [b] float32
    top_k: Tensor  # [b] int64; 0 keeps all
    top_p: Tensor  # [b] float64; 1 keeps all
    repetition_penalty: Tensor  # [b] float32
    seeds: Tensor  # [b] int64
    samples: bool  # a row may sample
    largest_top_k: int  # of all rows
    uses_top_p: bool  # a row may have a top_p below 1

    def select(self, index: Tensor) -> "SamplingRows":
        """The rows at index [n]."""
        columns = {f.name: x[index] for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **columns)


def choose_tokens(logits: Tensor, rows: SamplingRows, draw: Tensor, seen: Tensor | None = None) -> Tensor:
    """Choose the next token of each row: logits [b, v] float32 -> tokens [b] int64.

    draw: [b] int64, the tokens that each row has drawn before. seen: [b, v] bool, the tokens that count as repeated, or
    None if no row has a repetition penalty. A row whose scores are not numbers, or of which nothing can be drawn, gets
    `NO_TOKEN`.
    """
    scores = logits if seen is None else penalize(logits, rows, seen)
    return draw_tokens(warp(scores, rows), rows, draw)


def penalize(logits: Tensor, rows: SamplingRows, seen: Tensor) -> Tensor:
    """Make the tokens that were seen [b, v] bool less likely -> scores [b, v] (Keskar et al. 2019, CTRL)."""
    penalty = rows.repetition_penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def warp(scores: Tensor, rows: SamplingRows) -> Tensor:
    """Divide scores [b, v] by the temperature, and set those to -inf that top_k and then top_p leave out.

    Kept are the tokens that transformers' warpers keep: all that equal the k-th, and of tokens that are equal where
    top_p cuts, those with higher ids.
    """
    if not rows.samples:
        return scores
    scores = scores / rows.temperature[:, None]
    v = scores.shape[-1]
    if rows.largest_top_k:
        k = torch.where(rows.top_k > 0, rows.top_k, v).clamp(max=v)[:, None]
        largest = scores.topk(min(rows.largest_top_k, v)).values  # [b, k']
        kth = torch.where(k <= largest.shape[1], largest.gather(1, k.clamp(max=largest.shape[1]) - 1), -torch.inf)
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if rows.uses_top_p:
        ascending, ids = scores.sort(dim=-1, stable=True)
        cumulative = (_integer_probabilities(ascending).cumsum(-1).double() * 2.0**-PROBABILITY_BITS).float()
        is_left_out = (cumulative <= (1 - rows.top_p).float()[:, None]) & (rows.top_p < 1)[:, None]
        first = is_left_out.sum(-1, keepdim=True).clamp(max=v - 1)  # [b, 1], of the kept ones in ascending order
        cut, cut_id = ascending.gather(1, first), ids.gather(1, first)
        is_before = torch.arange(v, device=scores.device) < cut_id
        scores = scores.masked_fill((scores < cut) | ((scores == cut) & is_before), -torch.inf)
    return scores


def draw_tokens(scores: Tensor, rows: SamplingRows, draw: Tensor) -> Tensor:
    """Take the likeliest token of a greedy row, draw one of any other: warped scores [b, v] -> tokens [b], as
    `choose_tokens`.

    The token drawn is the first whose probability and those of all tokens before it exceed a random part of 1 together.
    """
    likeliest = scores.argmax(-1)
    highest = scores.gather(1, likeliest[:, None])[:, 0]  # NaN if any is
    if not rows.samples:
        return likeliest.masked_fill(highest.isnan(), NO_TOKEN)
    cumulative = _integer_probabilities(scores).cumsum(-1)
    total = cumulative[:, -1:]
    target = (uniform(rows.seeds, draw)[:, None] * total.double()).long().minimum(total - 1)
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    tokens = torch.where(rows.do_sample, drawn, likeliest)
    return tokens.masked_fill(highest.isnan() | (highest.isinf() & rows.do_sample), NO_TOKEN)


def seen_tokens(texts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str) -> Tensor:
    """Return for each text which tokens of the vocabulary are in it: [b, v] bool."""
    seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
    for row, text in zip(seen, texts):
        row[[token for token in text if token < vocab_size]] = True
    return seen.to(device)


def mark_seen(seen: Tensor, tokens: Tensor) -> None:
    """Note the chosen tokens [b] in `seen` [b, v], in place; for `NO_TOKEN` nothing is noted."""
    ids = tokens[:, None].clamp(min=0)
    seen.scatter_(1, ids, seen.gather(1, ids) | (tokens[:, None] >= 0))


def _integer_probabilities(scores: Tensor) -> Tensor:
    """The softmax of scores [b, v] as multiples of 2^-`PROBABILITY_BITS`, [b, v] int64."""
    v = scores.shape[-1]
    if scores.is_cuda and v % ALIGNED_ROWS:  # else the order of its sums depends on where the row lies
        scores = F.pad(scores, (0, -v % ALIGNED_ROWS), value=-torch.inf)
    return (scores.softmax(-1)[:, :v].double() * 2.0**PROBABILITY_BITS).long()


def check_token(seq: int, token: int) -> None:
    """Errors: RuntimeError for `NO_TOKEN`."""
    if token == NO_TOKEN:
        raise RuntimeError(f"sequence {seq}: the model's scores of the next token are not finite numbers")
