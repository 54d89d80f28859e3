"""Exact-match accuracy on held-out scenes: `python -m vila_triton.tiny.evaluate [--model FOLDER]`.

Every question goes the whole way: the picture through the image processor, the prompt through the template and the
tokenizer, the answer greedily through the engine. A question kind is asked of one picture, or of two or three.
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from vila_triton.arguments import KV_DTYPES, parse_kernel_settings
from vila_triton.chat.conversation import ChatModel
from vila_triton.console import exit_code, print_progress
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.hf.configuration_vila_llama import parse_dtype
from vila_triton.limits import COUNT, SEED
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import count_calls, use
from vila_triton.tiny.questions import KIND_GROUPS, KINDS, QA, random_question
from vila_triton.tiny.scenes import Scene, draw_scene, random_scene

BATCH_SIZE = 50


@dataclass(frozen=True)
class EvalQuestion:
    """A question about drawn scenes."""

    qa: QA
    images: Sequence[Image.Image]

    @property
    def kind(self) -> str:
        n = len(self.images)
        return self.qa.kind if n == 1 else f"{self.qa.kind}, {n} pictures"


def held_out_question(rng: random.Random, kind: str, num_images: int) -> EvalQuestion:
    """A question of a kind about that many held-out scenes; scenes that allow none are drawn again."""
    while True:
        scenes: list[Scene] = [random_scene(rng, "held_out") for _ in range(num_images)]
        try:
            return EvalQuestion(random_question(rng, scenes, kind), [draw_scene(scene, rng) for scene in scenes])
        except ValueError:
            continue


# What the bundled model is offered for, by number of pictures: what it gets right at least nine times in ten.
SUPPORTED_KINDS: dict[int, list[str]] = {
    1: [kind for kind, entry in KINDS.items() if entry.about_one],
    2: [kind for kind in KINDS if kind not in ("count colour", "where")],
    3: ["count all", "colour", "shape", "at"],
}
# Everything that can be asked: the comparing kinds need several pictures, two of them just two.
ALL_KINDS = {
    1: SUPPORTED_KINDS[1],
    2: list(KINDS),
    3: [kind for kind in KINDS if kind not in ("total", "more")],
}


def build_questions(
    per_kind: int, seed: int, kinds: Mapping[int, Sequence[str]] = SUPPORTED_KINDS
) -> list[EvalQuestion]:
    """That many questions of every kind and number of pictures."""
    rng = random.Random(seed)
    return [held_out_question(rng, kind, n) for _ in range(per_kind) for n in kinds for kind in kinds[n]]


@torch.inference_mode()
def greedy_answers(chat_model: ChatModel, batch: Sequence[EvalQuestion]) -> list[str]:
    """Greedy answers, all in one ragged batch."""
    prompts = [torch.tensor(chat_model.prompt_ids(i.qa.question, len(i.images))) for i in batch]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    pixels = chat_model.preprocess_images([image for i in batch for image in i.images])
    return chat_model.tokenizer.batch_decode(
        chat_model.model.generate(ids, pixels, mask, max_new_tokens=64), skip_special_tokens=True
    )


def evaluate(chat_model: ChatModel, questions: Sequence[EvalQuestion]) -> dict[str, list[bool]]:
    """Right or wrong for every question, by kind; shows progress on standard error."""
    correct: dict[str, list[bool]] = defaultdict(list)
    start_time = time.monotonic()
    for offset in range(0, len(questions), BATCH_SIZE):
        batch = questions[offset : offset + BATCH_SIZE]
        for question, answer in zip(batch, greedy_answers(chat_model, batch), strict=True):
            correct[question.kind].append(answer == question.qa.answer)
        done = offset + len(batch)
        seconds_left = (time.monotonic() - start_time) / done * (len(questions) - done)
        print_progress(f"{done} of {len(questions)} questions, {seconds_left:.0f} s left", done == len(questions))
    return correct


def accuracy_table(correct: Mapping[str, Sequence[bool]]) -> str:
    lines = [f"{'kind':28}{'group':20}{'right':>8}{'of':>7}"]
    for kind, values in correct.items():
        group = KIND_GROUPS[kind.partition(",")[0]]
        lines.append(f"{kind:28}{group:20}{100 * sum(values) / len(values):7.1f}%{len(values):7}")
    all_values = [value for values in correct.values() for value in values]
    return "\n".join([*lines, f"{'all':48}{100 * sum(all_values) / len(all_values):7.2f}%{len(all_values):7}"])


def compare_kernels(chat_model: ChatModel, questions: Sequence[EvalQuestion], kernels: Mapping[str, str]) -> str:
    """How many answers the given kernels and the default ones share."""
    default_answers = [
        a
        for offset in range(0, len(questions), BATCH_SIZE)
        for a in greedy_answers(chat_model, questions[offset : offset + BATCH_SIZE])
    ]
    with use(**kernels), count_calls() as calls:
        kernel_answers = [
            a
            for at in range(0, len(questions), BATCH_SIZE)
            for a in greedy_answers(chat_model, questions[at : at + BATCH_SIZE])
        ]
    ran = ", ".join(sorted(f"{op}={impl}" for op, impl in calls if kernels.get(op) == impl))
    return (
        f"{sum(map(str.__eq__, kernel_answers, default_answers))} of {len(questions)} answers are the same under {ran}"
    )


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT)
    parser.add_argument("--count", type=COUNT, default=100, help="questions of each kind and number of pictures")
    parser.add_argument("--all", action="store_true", help="also the kinds that the model is not offered for")
    parser.add_argument("--limit", type=COUNT, help="stop after so many questions")
    parser.add_argument("--seed", type=SEED, default=12345)
    parser.add_argument("--device")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, help="of the cache (default: the model's)")
    parser.add_argument("--dtype", type=lambda name: parse_dtype(f"torch.{name}"), help="(default: the model's)")
    parser.add_argument(
        "--against",
        action="append",
        metavar="kernels.OP=NAME",
        help="count the answers that these kernels change (on a CPU, Triton needs TRITON_INTERPRET=1)",
    )
    args = parser.parse_args()
    talker = load_chat_model(args.model, args.device, args.dtype)
    talker.model.config.kv_dtype = args.kv_dtype
    questions = build_questions(args.count, args.seed, ALL_KINDS if args.all else SUPPORTED_KINDS)[: args.limit]
    if args.against:
        print(compare_kernels(talker, questions, parse_kernel_settings(args.against)))
    else:
        print(accuracy_table(evaluate(talker, questions)))


def main() -> int:
    return exit_code("vila_triton.tiny.evaluate", run)


if __name__ == "__main__":
    sys.exit(main())
