"""Teach the bundled int4 model a new kind of question by LoRA: `python -m vila_triton.tiny.finetune --out DIR`.

The new kind is "Which colour has more shapes?", which the model never met and answers wrongly. Its int4 weights stay as
they are; low-rank terms beside the linears of its language model learn (Hu et al. 2021; over a quantized base: Dettmers
et al. 2023), by `peft`. Part of each batch are questions of the old kinds, so that they are not forgotten. DIR gets the
adapter and loss.svg. Accuracy on held-out scenes is printed before and after; after is with the adapter loaded again.
"""

import argparse
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_triton.chat.conversation import ChatModel
from vila_triton.console import exit_code
from vila_triton.files.svg_chart import COLORS, draw_chart
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.limits import COUNT, POSITIVE, SEED, Limits
from vila_triton.models.vila import IGNORE_INDEX
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.evaluate import SUPPORTED_KINDS, EvalQuestion, build_questions, evaluate, question_of_kind
from vila_triton.tiny.questions import NEW_KINDS
from vila_triton.tiny.train import TrainingClock, cosine_decay, optimizer_step, set_learning_rates

INT4_CHECKPOINT = BUNDLED_CHECKPOINT.with_name("checkpoint-int4")
ADAPTED_LINEARS = r"llm\..*_proj"  # a pattern of names, since the linears of the vision tower have the same last words
OLD_KINDS = [(kind, n) for n, kinds in SUPPORTED_KINDS.items() for kind in kinds]
SMOOTHING = 0.9  # of the line over the losses of single steps


@dataclass(frozen=True)
class Recipe:
    """The defaults stop training after four minutes at the latest."""

    seed: int = 0
    minutes: float = 4.0  # the learning rate reaches zero by then, whatever the steps
    steps: int = 100
    batch_size: int = 48
    lr: float = 3e-3
    warmup_steps: int = 20
    rank: int = 16
    old_fraction: float = 0.5  # part of the questions that are of the old kinds


LIMITS = dict.fromkeys(("steps", "batch_size", "warmup_steps", "rank"), COUNT) | {
    "seed": SEED,
    "minutes": POSITIVE,
    "lr": POSITIVE,
    "old_fraction": Limits(float, 0, 1),
}


def add_adapter(model: Any, rank: int) -> Any:
    """Return the model as a `PeftModel` that trains nothing but adapters beside the linears of its language model; as
    long as they are not trained they change nothing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise RuntimeError("adapters are made by peft, which is not installed: pip install peft") from None
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED_LINEARS))


def load_adapted(folder: Path) -> ChatModel:
    """Load the bundled int4 model with the adapter that `PeftModel.save_pretrained` wrote into a folder."""
    from peft import PeftModel

    chat_model = load_chat_model(INT4_CHECKPOINT, "cpu", torch.float32)
    PeftModel.from_pretrained(chat_model.model, str(folder))  # puts the adapter into the model itself
    return chat_model


def draw_questions(rng: random.Random, recipe: Recipe) -> list[EvalQuestion]:
    """Draw the questions of a batch, about scenes that are not held out."""
    kinds = [
        rng.choice(OLD_KINDS) if rng.random() < recipe.old_fraction else (rng.choice(list(NEW_KINDS)), 1)
        for _ in range(recipe.batch_size)
    ]
    return [question_of_kind(rng, *kind, "train") for kind in kinds]


def build_inputs(chat_model: ChatModel, questions: Sequence[EvalQuestion]) -> dict[str, Tensor]:
    """Return what `model.forward` takes to return the loss of the answers, each ended by `</s>`: input_ids, labels and
    attention_mask [b, t], padded on the right, and the images of all.
    """
    tokenizer = chat_model.tokenizer
    prompts = [chat_model.prompt_ids(question.qa.question, len(question.images)) for question in questions]
    answers = [
        [*tokenizer(question.qa.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for question in questions
    ]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers)]
    labels = [[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in zip(prompts, answers)]
    return {
        "input_ids": pad_rows(rows, tokenizer.pad_token_id),
        "labels": pad_rows(labels, IGNORE_INDEX),
        "attention_mask": pad_rows([[1] * len(row) for row in rows], 0),
        "images": chat_model.preprocess_images([image for question in questions for image in question.images]),
    }


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pad rows of integers on the right -> [b, t]."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def train(model: torch.nn.Module, chat_model: ChatModel, recipe: Recipe) -> list[float]:
    """Train the parameters of the model that require a gradient; returns the loss of each step."""
    weights = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW([{"params": weights, "base": recipe.lr}], weight_decay=0.0)
    clock, rng, losses = TrainingClock("adapter", recipe.steps, recipe.minutes * 60), random.Random(recipe.seed), []
    model.train()
    for step, progress in clock.ticks():
        set_learning_rates([optimizer], cosine_decay(progress) * min(1.0, (step + 1) / recipe.warmup_steps))
        inputs = build_inputs(chat_model, draw_questions(rng, recipe))
        loss = model(**inputs, use_cache=False).loss
        optimizer_step(loss, weights, [optimizer])
        losses.append(loss.item())
        if step % 10 == 0:
            clock.report(step, progress, losses[-1])
    model.eval()
    return losses


def comparison_table(before: Mapping[str, Sequence[bool]], after: Mapping[str, Sequence[bool]]) -> str:
    """Format two results of `evaluate`: rows are the new kinds, each old one, and all old ones together."""
    old = [kind for kind in before if kind not in NEW_KINDS]
    rows = {f"{kind} (new)": [kind] for kind in before if kind in NEW_KINDS}
    rows |= {kind: [kind] for kind in old} | {"all old kinds": old}
    lines = [f"{'kind':28}{'before':>8}{'after':>8}{'of':>7}"]
    for name, kinds in rows.items():
        values = [[right for kind in kinds for right in results[kind]] for results in (before, after)]
        shares = "".join(f"{100 * sum(v) / len(v):7.1f}%" for v in values)
        lines.append(f"{name:28}{shares}{len(values[0]):7}")
    return "\n".join(lines)


def draw_losses(losses: Sequence[float], recipe: Recipe) -> str:
    """Draw the loss of each step and its running mean as SVG."""
    means = list(accumulate(losses, lambda mean, loss: SMOOTHING * mean + (1 - SMOOTHING) * loss))
    lines = [("a step", "#bbbbbb", losses, ""), ("running mean", COLORS[0], means, "")]
    settings = ", ".join(f"{field.name} {getattr(recipe, field.name)}" for field in fields(recipe))
    return draw_chart([f"LoRA on the bundled int4 model: {settings}"], [("loss of the answers", lines, True)], "step")


def parse_arguments() -> tuple[Path, int, Recipe]:
    """Return the folder to write, the questions of each kind to grade, and the recipe, as the command line has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-adapter"), help="folder to write (tiny-adapter)")
    parser.add_argument(
        "--count", type=COUNT, default=20, help="questions of each old kind to grade (20); ten times as many new"
    )
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=LIMITS[field.name], default=field.default, help=f"({field.default})")
    args = vars(parser.parse_args())
    return args.pop("out"), args.pop("count"), Recipe(**args)


def run() -> None:
    """Grade, train, save, grade again, as the command line says."""
    out, count, recipe = parse_arguments()
    chat_model, start_time = load_chat_model(INT4_CHECKPOINT, "cpu", torch.float32), time.monotonic()
    torch.manual_seed(recipe.seed)
    model = add_adapter(chat_model.model, recipe.rank)
    num_trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    print(f"training {num_trained:,} parameters of adapters beside a language model in int4", flush=True)
    questions = build_questions(10 * count, 1, {1: list(NEW_KINDS)}) + build_questions(count, 2)
    before = evaluate(chat_model, questions)
    losses = train(model, chat_model, recipe)
    model.save_pretrained(str(out))
    (out / "loss.svg").write_text(draw_losses(losses, recipe))
    print(comparison_table(before, evaluate(load_adapted(out), questions)))
    print(f"{out}: the adapter and loss.svg; {time.monotonic() - start_time:.0f} s in all")


def main() -> int:
    return exit_code("vila_triton.tiny.finetune", run)


if __name__ == "__main__":
    sys.exit(main())
