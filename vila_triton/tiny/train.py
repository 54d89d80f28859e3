"""Train the tiny VILA from nothing on a CPU: `python -m vila_triton.tiny.train --out DIR`.

Stage 0 teaches the vision tower alone to name what each patch shows. Stage 1 trains projector and language model on
questions; the tower stays frozen for its first part and then learns slowly, since at full speed it forgets stage 0.
"""

import argparse
import itertools
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vila_triton.arguments import OldOption
from vila_triton.console import exit_code
from vila_triton.limits import COUNT, POSITIVE, SEED, Limits
from vila_triton.models import llama, params, projector, vision
from vila_triton.ops import rope
from vila_triton.tiny.config import CONFIG, PARAM_SPECS, save_checkpoints
from vila_triton.tiny.questions import KINDS
from vila_triton.tiny.scenes import COLORS, SHAPES, Scene, draw_scene, random_scene
from vila_triton.tiny.training_data import RowGroup, TrainingBatch, build_batch, preprocess

# rows, images per row, conversation; a fifth of the rows are conversations
BATCH_PLAN = ((15, 1, False), (9, 2, False), (2, 3, False), (3, 1, True), (2, 2, True), (1, 3, True))
# Of the 8x8 patches, cell by cell: the two by two that lie wholly in it.
CELL_PATCHES = [8 * (3 * i + y) + 3 * j + x for i in range(3) for j in range(3) for y in (0, 1) for x in (0, 1)]
SAVE_EVERY = 300.0  # seconds

ParamTrees = dict[str, Any]  # the params tree of each part


@dataclass(frozen=True)
class Recipe:
    """The defaults take about half an hour on two cores."""

    seed: int = 0
    minutes: float = 43.0  # the learning rate reaches zero by then, whatever the steps
    vision_steps: int = 800
    steps: int = 2200
    vision_lr: float = 1e-3
    lr: float = 2e-3
    frozen_fraction: float = 0.4  # part of stage 1 in which the tower does not learn
    tower_lr_factor: float = 0.1
    warmup_steps: int = 60


LIMITS = dict.fromkeys(("vision_steps", "steps", "warmup_steps"), COUNT) | {
    "seed": SEED,
    "minutes": POSITIVE,
    "vision_lr": POSITIVE,
    "lr": POSITIVE,
    "frozen_fraction": Limits(float, 0, 1),
    "tower_lr_factor": Limits(float, 0, 1),
}

OLD_OPTIONS = {
    "vision_lr": "--vision-rate",
    "lr": "--rate",
    "frozen_fraction": "--frozen",
    "tower_lr_factor": "--tower-factor",
    "warmup_steps": "--warm-up",
}


class PackedAttention:
    """Attention within the rows of a batch instead of a cache. Plain matmuls: masked SDPA is slow backward on a CPU."""

    def __init__(self, groups: list[RowGroup]):
        self.groups = groups
        self.biases = [torch.zeros(g.mask.shape).masked_fill_(~g.mask, -math.inf)[:, None] for g in groups]

    numerics = "fast"

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: llama.CosSin, scale: float) -> Tensor:
        q, k = rope(q, *rotary), rope(k, *rotary)
        sizes = [g.rows * g.length for g in self.groups]
        parts = zip(self.groups, self.biases, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        return torch.cat([self._attend_group(g, bias, qs * scale, ks, vs) for g, bias, qs, ks, vs in parts])

    @staticmethod
    def _attend_group(group: RowGroup, bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, s, heads = group.rows, group.length, q.shape[1]
        q, k, v = (x.unflatten(0, (b, s)).transpose(1, 2) for x in (q, k, v))  # [b, h or g, s, d]
        q = q.reshape(b, k.shape[1], -1, q.shape[-1])  # [b, g, h/g * s, d]
        scores = (q @ k.mT).view(b, heads, s, s) + bias
        out = scores.softmax(-1).view(b, k.shape[1], -1, s) @ v
        return out.view(b, heads, s, -1).transpose(1, 2).flatten(0, 1)  # [b s, h, d]


class TrainingClock:
    """Progress from 0 to 1 by steps, or by time on a machine that is too slow for the steps."""

    def __init__(self, name: str, steps: int, seconds: float):
        self.name, self.steps, self.seconds = name, steps, seconds
        self.start_time = time.monotonic()

    def ticks(self) -> Iterator[tuple[int, float]]:
        for step in itertools.count():
            progress = max(step / self.steps, (time.monotonic() - self.start_time) / self.seconds)
            if progress >= 1:
                return
            yield step, progress

    def report(self, step: int, progress: float, loss: float) -> None:
        elapsed = time.monotonic() - self.start_time
        remaining = elapsed * (1 - progress) / progress if step else math.nan
        speed = f"{elapsed / max(step, 1):.3f} s/step  ETA {remaining / 60:.1f} min"
        print(f"{self.name} step {step:5d}  loss {loss:.4f}  {speed}", flush=True)


def cosine_decay(progress: float) -> float:
    """Return a factor that falls from 1 to 0 along half a cosine while progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to its base rate times the factor."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["base"] * factor


def optimizer_step(loss: Tensor, weights: Sequence[Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    """Take a step of all optimizers, with gradients clipped to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def patch_labels(scene: Scene) -> Tensor:
    """Return color, shape and cell [9, 4, 3] of the four patches wholly in each cell; 0, 0 where it is empty.

    The cell is a label too, since rotary embeddings leave the position of a token out of its hidden state.
    """
    labels = torch.zeros(9, 4, 3, dtype=torch.int64)
    for cell in range(9):
        labels[cell, :, 2] = cell
        if thing := scene.thing_at(cell):
            labels[cell, :, 0] = 1 + list(COLORS).index(thing.color)
            labels[cell, :, 1] = 1 + SHAPES.index(thing.shape)
    return labels


def train_vision(p: Any, recipe: Recipe, rng: random.Random) -> None:
    """Stage 0: train the tower with linear heads, discarded later, that read color, shape and cell off the patches."""
    classes = (1 + len(COLORS), 1 + len(SHAPES), 9)
    heads = torch.nn.Linear(CONFIG.vision_tower.hidden_size, sum(classes))
    weights = [*params.leaves(p), *heads.parameters()]
    optimizer = torch.optim.AdamW([{"params": weights, "base": recipe.vision_lr}])
    clock = TrainingClock("vision", recipe.vision_steps, recipe.minutes * 60 / 4)
    for step, progress in clock.ticks():
        scenes = [random_scene(rng) for _ in range(96)]
        labels = torch.stack([patch_labels(scene) for scene in scenes]).flatten(0, 2)
        with torch.autocast("cpu", torch.bfloat16):
            features = vision.forward(p, preprocess([draw_scene(scene, rng) for scene in scenes]), CONFIG.vision_tower)
            scores = heads(features[:, CELL_PATCHES].flatten(0, 1)).float().split(classes, dim=-1)
        set_learning_rates([optimizer], cosine_decay(progress) * min(1.0, (step + 1) / recipe.warmup_steps))
        loss = torch.stack([F.cross_entropy(*pair) for pair in zip(scores, labels.T, strict=True)]).sum()
        optimizer_step(loss, weights, [optimizer])
        if step % 50 == 0:
            correct = torch.stack([s.argmax(-1) for s in scores], dim=-1).eq(labels).all(-1)[labels[:, 1] > 0]
            clock.report(step, progress, loss.item())
            print(f"       color, shape and cell of {100 * correct.float().mean().item():.1f} % of things", flush=True)


def answer_logits(p: ParamTrees, b: TrainingBatch, token_indices: Tensor, train_tower: bool) -> Tensor:
    """Return the logits [m, v] that predict the tokens at these indices."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
            features = vision.forward(p["vision_tower"], b.pixels, CONFIG.vision_tower)
        features = projector.forward(p["mm_projector"], features, CONFIG.mm_projector).flatten(0, 1)
        x = llama.embed(p["llm"], b.ids.clamp(min=0))
        x = x.index_copy(0, (b.ids < 0).nonzero()[:, 0], features.to(x.dtype))
        hidden_states = llama.forward(p["llm"], x, b.positions, CONFIG.llm, PackedAttention(b.groups))
        return llama.logits(p["llm"], hidden_states[token_indices - 1]).float()


def initial_params(seed: int) -> ParamTrees:
    """Return random trainable parameters of the three parts, in fp32."""
    rng = torch.Generator().manual_seed(seed)
    specs = {name: declare(getattr(CONFIG, name), torch.float32) for name, declare in PARAM_SPECS.items()}
    trees = {name: params.init_tree(tree, rng) for name, tree in specs.items()}
    return {name: params.tree_map(Tensor.requires_grad_, tree) for name, tree in trees.items()}


def build_optimizers(p: ParamTrees, recipe: Recipe) -> tuple[list[torch.optim.Optimizer], torch.optim.Optimizer]:
    """Return the optimizers of projector and language model, and that of the tower."""
    language, tower = params.leaves(p["llm"]), params.leaves(p["vision_tower"])
    matrices = [w for w in params.leaves(p["llm"].layers) if w.ndim == 2]
    matrix_ids = set(map(id, matrices))
    others = [w for w in language if id(w) not in matrix_ids] + params.leaves(p["mm_projector"])
    return [
        torch.optim.Muon([{"params": matrices, "base": recipe.lr}], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": others, "base": recipe.lr}]),
    ], torch.optim.AdamW([{"params": tower, "base": recipe.lr * recipe.tower_lr_factor}])


def train_answers(p: ParamTrees, recipe: Recipe, rng: random.Random, seconds: float, out: Path) -> None:
    """Stage 1: train on all questions; the tower learns too after a part in which it is frozen."""
    language, tower = build_optimizers(p, recipe)
    clock, last_save = TrainingClock("answers", recipe.steps, seconds), time.monotonic()
    for step, progress in clock.ticks():
        train_tower = progress >= recipe.frozen_fraction
        active = [*language, tower] if train_tower else language
        b = build_batch(rng, BATCH_PLAN)
        token_indices, weights = b.targets()
        losses = F.cross_entropy(
            answer_logits(p, b, token_indices, train_tower), b.ids[token_indices], reduction="none"
        )
        loss = (losses * weights).sum() / weights.sum()
        set_learning_rates(active, cosine_decay(progress) * min(1.0, (step + 1) / recipe.warmup_steps))
        optimizer_step(loss, [w for o in active for g in o.param_groups for w in g["params"]], active)
        if step % 25 == 0:
            clock.report(step, progress, loss.item())
        if time.monotonic() - last_save > SAVE_EVERY:
            save_checkpoints(out, p)
            last_save = time.monotonic()


@torch.no_grad()
def evaluate(p: ParamTrees, rng: random.Random, batches: int = 12) -> dict[tuple[str, int, bool], list[bool]]:
    """Return by (kind, images, conversation) which held-out answers are exact, with teacher forcing."""
    results = defaultdict(list)
    for _ in range(batches):
        b = build_batch(rng, BATCH_PLAN, "held_out")
        token_indices, _ = b.targets()
        correct = answer_logits(p, b, token_indices, train_tower=False).argmax(-1) == b.ids[token_indices]
        for answer, tokens in zip(b.answers, correct.split([a.stop - a.start for a in b.answers]), strict=True):
            results[answer.kind, answer.num_images, answer.conversation].append(bool(tokens.all()))
    return results


def results_table(results: dict[tuple[str, int, bool], list[bool]]) -> str:
    """Format the percentages of right answers: rows are kinds, columns numbers of images, alone or in conversation."""
    columns = sorted({key[1:] for key in results})
    lines = [f"{'kind':14}" + "".join(f"{n} {'chat' if chat else 'alone':>5}  " for n, chat in columns)]
    for kind in KINDS:
        cells = (results.get((kind, *column), []) for column in columns)
        lines.append(f"{kind:14}" + "".join(f"{100 * sum(c) / len(c):7.1f}  " if c else f"{'-':>7}  " for c in cells))
    all_values = [right for cell in results.values() for right in cell]
    return "\n".join([*lines, f"all {100 * sum(all_values) / len(all_values):.2f} % of {len(all_values)} answers"])


def run() -> None:
    """Train by the recipe of the command line, save the checkpoints, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-vila"))
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        action = parser.add_argument(option, type=LIMITS[field.name], default=field.default, help=f"({field.default})")
        if field.name in OLD_OPTIONS:
            parser.add_argument(OLD_OPTIONS[field.name], action=OldOption, new=action)
    args = vars(parser.parse_args())
    out, recipe = args.pop("out"), Recipe(**args)
    start_time, rng = time.monotonic(), random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    p = initial_params(recipe.seed)
    train_vision(p["vision_tower"], recipe, rng)
    train_answers(p, recipe, rng, recipe.minutes * 60 - (time.monotonic() - start_time), out)
    save_checkpoints(out, p)
    print(results_table(evaluate(p, random.Random(recipe.seed + 1))))


def main() -> int:
    return exit_code("vila_triton.tiny.train", run)


if __name__ == "__main__":
    sys.exit(main())
