"""Measures what int4 costs a language model: `python -m bench.quality [--model bundled outliers smollm2] [--out ROWS]`

Quantizes language models by round to nearest (rtn), as llm-awq does and by vila-triton's default (awq-gptq), and
evaluates them on text or questions that calibration did not see. `outliers` is the bundled model with some channels of
its norms scaled up and the weights behind them scaled down, which changes nothing until weights are quantized.
`repaired` is the part of rtn's loss in perplexity that a method avoids.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.arguments import renamed_values
from vila_triton.cache.paged_cache import UncachedBatch
from vila_triton.chat.conversation import ChatModel
from vila_triton.console import print_progress
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.limits import COUNT, SEED
from vila_triton.models import llama, vila
from vila_triton.models.config import LlamaConfig
from vila_triton.models.params import tree_map
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.quantization import awq_gptq, llm_awq
from vila_triton.quantization.activations import CalibrationTokens
from vila_triton.quantization.calibration_data import Sample, build_calibration_set, synthetic_samples
from vila_triton.tiny.evaluate import SUPPORTED_KINDS, build_questions

from ._tool import kernels_option, tool
from .measure import rows, smollm2

NUM_QUESTIONS = 400  # about held-out scenes, of all kinds
METHODS = ("rtn", "llm-awq", "awq-gptq")


@dataclass(frozen=True)
class EvaluationText:
    """Rows end to end: the embeddings [s, e], the lengths of the rows, the next token at each position [s] or -100
    where none is evaluated, and for questions their kinds.
    """

    embeddings: Tensor
    lengths: list[int]
    labels: Tensor
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its calibration and held-out text."""

    name: str
    p: llama.Llama
    cfg: LlamaConfig
    calibration: EvaluationText
    held_out: EvaluationText


def quantize_model(subject: EvaluatedModel, method: str, group_size: int) -> llama.Llama:
    """Returns the model with int4 linears; shows progress on stderr."""
    if method == "rtn":
        return llama.quantize_linears_rtn(subject.p, group_size)
    tokens = CalibrationTokens(tuple(subject.calibration.lengths), torch.ones(len(subject.calibration.embeddings)))
    hidden_states = quantized_hidden_states = subject.calibration.embeddings
    layers, start = [], time.monotonic()
    for i, layer in enumerate(subject.p.layers):
        if method == "awq-gptq":
            result = awq_gptq.quantize_layer(
                layer, hidden_states, quantized_hidden_states, tokens, subject.cfg, group_size
            )
            new, hidden_states, quantized_hidden_states = result.layer, result.reference_out, result.quantized_out
        else:
            new, hidden_states, _ = llm_awq.quantize_layer(layer, hidden_states, tokens, subject.cfg, group_size)
        layers.append(new)
        seconds_left = (time.monotonic() - start) / (i + 1) * (len(subject.p.layers) - i - 1)
        done = f"{i + 1} of {len(subject.p.layers)} layers, {seconds_left:.0f} s left"
        print_progress(f"{subject.name} {method} {group_size}: {done}")
    print_progress("")
    return replace(subject.p, layers=tuple(layers))


def log_probabilities(p: llama.Llama, cfg: LlamaConfig, text: EvaluationText) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, for some rows at a time, log-probabilities [s, v] at the evaluated positions, and their tokens [s]."""
    for positions, lengths in CalibrationTokens(tuple(text.lengths), torch.empty(0)).batches():
        cache = UncachedBatch(lengths, text.embeddings.device)
        has_label = text.labels[positions] >= 0
        hidden = llama.forward(p, text.embeddings[positions], cache.positions, cfg, cache)[has_label]
        yield llama.logits(p, hidden).float().log_softmax(-1), text.labels[positions][has_label]


@torch.no_grad()
def evaluate_model(subject: EvaluatedModel, p: llama.Llama) -> dict[str, Any]:
    """Returns perplexity, KL(float || int4) per token in nats, the share of tokens whose likeliest prediction is right,
    and for each kind of question the share of answers that are right in all tokens.
    """
    loss = divergence = count = 0.0
    hits = list[Tensor]()
    for (expected, labels), (log_probs, _) in zip(
        log_probabilities(subject.p, subject.cfg, subject.held_out), log_probabilities(p, subject.cfg, subject.held_out)
    ):
        loss += float(F.nll_loss(log_probs, labels, reduction="sum"))
        divergence += float((expected.exp() * (expected - log_probs)).sum())
        hits.append((log_probs.argmax(-1) == labels).float())
        count += len(labels)
    hit, text = torch.cat(hits), subject.held_out
    row = torch.arange(len(text.lengths)).repeat_interleave(torch.tensor(text.lengths))[text.labels >= 0]
    all_correct = torch.ones(len(text.lengths)).scatter_reduce(0, row, hit, "amin")
    kinds = dict.fromkeys(text.kinds)
    by_kind = {kind: float(all_correct[[x == kind for x in text.kinds]].mean()) for kind in kinds}
    metrics = {"perplexity": math.exp(loss / count), "kl": divergence / count, "right": float(hit.mean())}
    return metrics | {"tokens": count, "kinds": by_kind}


def embed_samples(chat_model: ChatModel, samples: Sequence[Sample]) -> EvaluationText:
    """Returns questions about images as embeddings; their answers are evaluated."""
    model, tokenizer = chat_model.model, chat_model.tokenizer
    image_tokens = model.vila_config.tokens_per_image
    batch = build_calibration_set(samples, tokenizer, chat_model.processor, model.config, image_tokens)
    features = model.encode_images(batch.pixel_values).flatten(0, 1) if batch.pixel_values is not None else None
    x = torch.cat([vila.embed_spliced(model.params, row, features) for row in batch.sequences])
    labels = [torch.cat((row[1:], row.new_tensor([-100]))) for row in batch.sequences]
    for label, sample in zip(labels, samples):
        answer_tokens = len(tokenizer(sample.answer, add_special_tokens=False).input_ids) + 1
        label[: len(label) - 1 - answer_tokens] = -100
    return EvaluationText(x.detach(), [len(row) for row in batch.sequences], torch.cat(labels))


def bundled_subject(samples: int, seed: int, num_questions: int = NUM_QUESTIONS) -> EvaluatedModel:
    """Returns the bundled model, calibrated on random training scenes and evaluated on questions about held-out
    scenes.
    """
    chat_model = load_chat_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    questions = build_questions(1 + num_questions // 25, seed + 1, SUPPORTED_KINDS)[:num_questions]
    calibration = embed_samples(chat_model, synthetic_samples(samples, seed))
    held_out = embed_samples(chat_model, [Sample(q.qa.question, q.images, q.qa.answer) for q in questions])
    held_out = replace(held_out, kinds=tuple(question.kind for question in questions))
    p = tree_map(lambda leaf: leaf.detach(), chat_model.model.params.llm)
    return EvaluatedModel("bundled", p, chat_model.model.vila_config.llm, calibration, held_out)


def add_outliers(subject: EvaluatedModel, seed: int, share: float = 0.05) -> EvaluatedModel:
    """Returns the same function with outliers: in every norm of a layer a share of the channels is 2³ to 2⁶ times as
    large.
    """
    rng = torch.Generator().manual_seed(seed)

    def scale_channels(layer: llama.Layer) -> llama.Layer:
        for norm, linear_names in (("attention_norm", "q k v"), ("mlp_norm", "gate up")):
            e = len(getattr(layer, norm))
            is_outlier = torch.rand(e, generator=rng) < share
            factor = torch.where(is_outlier, 2 ** (3 + 3 * torch.rand(e, generator=rng)), 1.0)
            linears = {name: getattr(layer, name) for name in linear_names.split()}
            quiet = {name: replace(linear, weight=linear.weight / factor) for name, linear in linears.items()}
            layer = replace(layer, **{norm: getattr(layer, norm) * factor}, **quiet)
        return layer

    layers = tuple(scale_channels(layer) for layer in subject.p.layers)
    return replace(subject, name="outliers", p=replace(subject.p, layers=layers))


def smollm2_subject(num_blocks: int, seed: int) -> EvaluatedModel:
    """Returns SmolLM2-135M-Instruct with English text that packages ship."""
    model, tokenizer = smollm2.load_hugging_face()
    p, cfg = smollm2.convert_model(model)

    texts = [embed_tokens(p, ids) for ids in smollm2.calibration_and_held_out(tokenizer, num_blocks, seed=seed)]
    return EvaluatedModel("smollm2", p, cfg, *texts)


def embed_tokens(p: llama.Llama, ids: Tensor) -> EvaluationText:
    """Returns rows of token ids [rows, length] as embeddings; every next token is evaluated."""
    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), 1)
    return EvaluationText(llama.embed(p, ids.flatten()), [ids.shape[1]] * len(ids), labels.flatten())


def load_subject(name: str, samples: int, seed: int) -> EvaluatedModel:
    """Returns a model by its name on the command line."""
    if name == "smollm2":
        return smollm2_subject(samples // 16, seed)
    return bundled_subject(samples, seed) if name == "bundled" else add_outliers(bundled_subject(samples, seed), seed)


@torch.no_grad()
def quality_rows(
    subject: EvaluatedModel, methods: Sequence[str], group_sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yields a row for the float model, then one for each method and group size; group sizes that do
    not fit are named.
    """
    baseline = evaluate_model(subject, subject.p)
    yield {"model": subject.name, "method": "float32", "group": 0, **baseline}
    for group_size in group_sizes:
        if subject.cfg.hidden_size % group_size or subject.cfg.intermediate_size % group_size:
            print(f"{subject.name}: {subject.cfg.hidden_size} inputs cannot be cut into groups of {group_size}")
            continue
        rtn_loss = math.nan
        for method in methods:
            start = time.monotonic()
            p = quantize_model(subject, method, group_size)
            metrics = {"seconds": time.monotonic() - start, **evaluate_model(subject, p)}
            rtn_loss = metrics["perplexity"] - baseline["perplexity"] if method == "rtn" else rtn_loss
            repaired = 1 - (metrics["perplexity"] - baseline["perplexity"]) / rtn_loss if rtn_loss > 0 else None
            yield {"model": subject.name, "method": method, "group": group_size, **metrics, "repaired": repaired}


@tool
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument(
        "--model", nargs="+", choices=("bundled", "outliers", "smollm2"), default=["bundled", "outliers"]
    )
    method = renamed_values(rows.RENAMED_METHODS)
    parser.add_argument("--methods", type=method, nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--groups", type=COUNT, nargs="+", default=[32, 64, 128])
    parser.add_argument("--samples", type=COUNT, default=128, help="of calibration; 16 of SmolLM2's tokens make one")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    args = parser.parse_args()
    print(
        f"{'model':10}{'method':>10}{'group':>7}{'perplexity':>12}{'repaired':>10}{'KL':>11}{'right':>9}{'seconds':>9}"
    )
    random.seed(args.seed)
    for name in args.model:
        model_rows = list[dict[str, Any]]()
        for row in quality_rows(load_subject(name, args.samples, args.seed), args.methods, args.groups):
            model_rows.append(row)
            share = f"{100 * row['repaired']:.1f} %" if row.get("repaired") is not None else ""
            print(
                f"{row['model']:10}{row['method']:>10}{row['group'] or '':>7}{row['perplexity']:12.4f}{share:>10}"
                f"{row['kl']:11.2e}{100 * row['right']:8.2f}%{row.get('seconds', 0):9.1f}",
                flush=True,
            )
            if args.out:
                labels = {"kind": "quality", "samples": args.samples, "seed": args.seed}
                rows.write(args.out, [{**labels, **row, **rows.stamp(torch.device("cpu"))}])
        if model_rows[0]["kinds"]:
            print(answers_table(model_rows))


def answers_table(model_rows: Sequence[dict[str, Any]]) -> str:
    """Returns a table of wholly right answers, a column for each row of `quality_rows`."""
    heads = "".join(f"{row['method']:>9} {row['group'] or '':<3}" for row in model_rows)
    lines = [f"{'answers right, %':26}{heads}"]
    for kind in model_rows[0]["kinds"]:
        lines.append(f"{kind:26}" + "".join(f"{100 * row['kinds'][kind]:9.1f}    " for row in model_rows))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
