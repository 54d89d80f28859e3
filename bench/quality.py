"""What int4 costs: `python -m bench.quality [--model bundled outliers smollm2] [--groups 32 64 128] [--out ROWS]`

Rounds language models to the nearest level (rtn), as llm-awq does (upstream) and as we do (ours), and measures on text
or questions that calibration did not see. `outliers` is the bundled model with some channels of its norms made louder
and the weights behind them quieter, which changes nothing until weights are rounded. `repaired` is the part of what rtn
loses in perplexity that a method does not.
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

from vila_triton.cache.paged_cache import Uncached
from vila_triton.chat.conversation import Talker
from vila_triton.console import bar
from vila_triton.limits import COUNT, SEED
from vila_triton.models import llama, vila
from vila_triton.models.config import LlamaConfig
from vila_triton.models.params import tree_map
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.quantization import awq_gptq, llm_awq
from vila_triton.quantization.activations import Tokens
from vila_triton.quantization.calibration_data import drawn, prompts
from vila_triton.tiny.evaluate import SHIPPED, items

from ._tool import tool
from .measure import rows, smollm2

QUESTIONS = 400  # about held-out scenes, of all kinds
METHODS = ("rtn", "upstream", "ours")


@dataclass(frozen=True)
class Text:
    """Rows end to end: what the first layer is given [s, e], their lengths, the next token of each place [s], or -100
    where none is asked for, and of questions the kinds.
    """

    x: Tensor
    lengths: list[int]
    labels: Tensor
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    name: str
    p: llama.Llama
    cfg: LlamaConfig
    calibration: Text
    held_out: Text


def rounded(s: Subject, method: str, group: int) -> llama.Llama:
    """The model with int4 linears; shows progress on standard error."""
    if method == "rtn":
        return llama.quantized(s.p, group)
    tokens = Tokens(tuple(s.calibration.lengths), torch.ones(len(s.calibration.x)))
    x = seen = s.calibration.x
    made, start = [], time.monotonic()
    for i, layer in enumerate(s.p.layers):
        if method == "ours":
            done = awq_gptq.quantize_layer(layer, x, seen, tokens, s.cfg, group)
            new, x, seen = done.layer, done.truth, done.seen
        else:
            new, x, _ = llm_awq.quantize_layer(layer, x, tokens, s.cfg, group)
        made.append(new)
        left = (time.monotonic() - start) / (i + 1) * (len(s.p.layers) - i - 1)
        bar(f"{s.name} {method} {group}: {i + 1} of {len(s.p.layers)} layers, {left:.0f} s left")
    bar("")
    return replace(s.p, layers=tuple(made))


def log_odds(p: llama.Llama, cfg: LlamaConfig, text: Text) -> Iterator[tuple[Tensor, Tensor]]:
    """Of some rows at a time: log probabilities [s, v] where a token is asked for, and those tokens [s]."""
    for at, lengths in Tokens(tuple(text.lengths), torch.empty(0)).runs():
        cache = Uncached(lengths, text.x.device)
        asked = text.labels[at] >= 0
        hidden = llama.llama(p, text.x[at], cache.positions, cfg, cache)[asked]
        yield llama.logits(p, hidden).float().log_softmax(-1), text.labels[at][asked]


@torch.no_grad()
def measure(s: Subject, p: llama.Llama) -> dict[str, Any]:
    """Perplexity, divergence KL(fp ‖ rounded) a token in nats, how often the likeliest token is the right one, and of
    each kind of question how often all tokens of the answer are.
    """
    loss = divergence = count = 0.0
    hits = list[Tensor]()
    for (truth, labels), (found, _) in zip(log_odds(s.p, s.cfg, s.held_out), log_odds(p, s.cfg, s.held_out)):
        loss += float(F.nll_loss(found, labels, reduction="sum"))
        divergence += float((truth.exp() * (truth - found)).sum())
        hits.append((found.argmax(-1) == labels).float())
        count += len(labels)
    hit, text = torch.cat(hits), s.held_out
    row = torch.arange(len(text.lengths)).repeat_interleave(torch.tensor(text.lengths))[text.labels >= 0]
    whole = torch.ones(len(text.lengths)).scatter_reduce(0, row, hit, "amin")
    by_kind = {kind: float(whole[[of == kind for of in text.kinds]].mean()) for kind in dict.fromkeys(text.kinds)}
    found = {"perplexity": math.exp(loss / count), "kl": divergence / count, "right": float(hit.mean())}
    return found | {"tokens": count, "kinds": by_kind}


def bundled(samples: int, seed: int, questions: int = QUESTIONS) -> Subject:
    """The bundled model, calibrated on drawn training scenes and measured on questions about held-out ones."""
    talker = Talker.from_pretrained(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    model, image_tokens = talker.model, talker.model.geometry.image_tokens
    held_out = items(1 + questions // 25, seed + 1, SHIPPED)[:questions]
    asked = [(i.qa.question, i.pictures, i.qa.answer) for i in held_out]
    groups = [[(d.text, d.pictures, d.answer) for d in drawn(samples, seed)], asked]

    def text(group: Sequence[Any]) -> Text:
        from vila_triton.quantization.calibration_data import Sample

        shown = prompts([Sample(*s) for s in group], talker.tokenizer, talker.processor, model.config, image_tokens)
        features = model.encode_images(shown.pixels).flatten(0, 1) if shown.pixels is not None else None
        x = torch.cat([vila.embed(model.params, row, features) for row in shown.rows])
        answers = [len(talker.tokenizer(a, add_special_tokens=False).input_ids) + 1 for _, _, a in group]
        labels = [torch.cat((row[1:], row.new_tensor([-100]))) for row in shown.rows]
        for label, n in zip(labels, answers):
            label[: len(label) - 1 - n] = -100
        return Text(x.detach(), [len(row) for row in shown.rows], torch.cat(labels))

    p = tree_map(lambda leaf: leaf.detach(), model.params.llm)
    calibration, found = (text(group) for group in groups)
    kinds = tuple(item.kind for item in held_out)
    return Subject("bundled", p, model.geometry.llm, calibration, replace(found, kinds=kinds))


def with_outliers(s: Subject, seed: int, share: float = 0.05) -> Subject:
    """The same function with outliers: in every norm of a layer a share of the channels is 2³ to 2⁶ times as loud."""
    rng = torch.Generator().manual_seed(seed)

    def louder(layer: llama.Layer) -> llama.Layer:
        for norm, after in (("attention_norm", "q k v"), ("mlp_norm", "gate up")):
            e = len(getattr(layer, norm))
            loud = torch.rand(e, generator=rng) < share
            factor = torch.where(loud, 2 ** (3 + 3 * torch.rand(e, generator=rng)), 1.0)
            linears = {name: getattr(layer, name) for name in after.split()}
            quiet = {name: replace(linear, weight=linear.weight / factor) for name, linear in linears.items()}
            layer = replace(layer, **{norm: getattr(layer, norm) * factor}, **quiet)
        return layer

    return replace(s, name="outliers", p=replace(s.p, layers=tuple(louder(layer) for layer in s.p.layers)))


def smol(each: int, seed: int) -> Subject:
    """SmolLM2-135M-Instruct on English that packages ship."""
    model, tokenizer = smollm2.hugging_face()
    p, cfg = smollm2.ours(model)

    def text(ids: Tensor) -> Text:
        labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), 1)
        return Text(llama.embed(p, ids.flatten()), [ids.shape[1]] * len(ids), labels.flatten())

    return Subject("smollm2", p, cfg, *(text(ids) for ids in smollm2.split(tokenizer, each, seed=seed)))


def subject(name: str, samples: int, seed: int) -> Subject:
    if name == "smollm2":
        return smol(samples // 16, seed)
    return bundled(samples, seed) if name == "bundled" else with_outliers(bundled(samples, seed), seed)


@torch.no_grad()
def table(s: Subject, methods: Sequence[str], groups: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for the model as it is, then one for each method and group; groups that do not fit are named."""
    base = measure(s, s.p)
    yield {"model": s.name, "method": "float32", "group": 0, **base}
    for group in groups:
        if s.cfg.hidden_size % group or s.cfg.intermediate_size % group:
            print(f"{s.name}: {s.cfg.hidden_size} inputs cannot be cut into groups of {group}")
            continue
        lost = math.nan
        for method in methods:
            start = time.monotonic()
            p = rounded(s, method, group)
            found = {"seconds": time.monotonic() - start, **measure(s, p)}
            lost = found["perplexity"] - base["perplexity"] if method == "rtn" else lost
            repaired = 1 - (found["perplexity"] - base["perplexity"]) / lost if lost > 0 else None
            yield {"model": s.name, "method": method, "group": group, **found, "repaired": repaired}


@tool
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", choices=("bundled", "outliers", "smollm2"), default=["bundled", "outliers"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
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
        found = list[dict[str, Any]]()
        for row in table(subject(name, args.samples, args.seed), args.methods, args.groups):
            found.append(row)
            share = f"{100 * row['repaired']:.1f} %" if row.get("repaired") is not None else ""
            print(
                f"{row['model']:10}{row['method']:>10}{row['group'] or '':>7}{row['perplexity']:12.4f}{share:>10}"
                f"{row['kl']:11.2e}{100 * row['right']:8.2f}%{row.get('seconds', 0):9.1f}",
                flush=True,
            )
            if args.out:
                about = {"kind": "quality", "samples": args.samples, "seed": args.seed}
                rows.write(args.out, [{**about, **row, **rows.stamp(torch.device("cpu"))}])
        if found[0]["kinds"]:
            print(by_kind(found))


def by_kind(found: Sequence[dict[str, Any]]) -> str:
    """A table of wholly right answers, a column for each row of `table`."""
    heads = "".join(f"{row['method']:>9} {row['group'] or '':<3}" for row in found)
    lines = [f"{'answers right, %':26}{heads}"]
    for kind in found[0]["kinds"]:
        lines.append(f"{kind:26}" + "".join(f"{100 * row['kinds'][kind]:9.1f}    " for row in found))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
