"""Exact-match accuracy on held-out scenes: `python -m vila_triton.tiny.evaluate [--model FOLDER]`.

Every question goes all the way: the image through the image processor, the prompt through the template and the
tokenizer, the answer greedily through the engine. Questions of a kind are asked about one, two or three images.
"""

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from vila_triton.arguments import KV_DTYPES, add_kernels_argument, discover_kernels, parse_kernel_settings
from vila_triton.chat.conversation import ChatModel
from vila_triton.console import Progress, exit_code
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.hf.configuration_vila_llama import parse_dtype
from vila_triton.limits import COUNT, SEED
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import count_calls, use
from vila_triton.tiny.questions import KIND_GROUPS, KINDS, QA, random_question
from vila_triton.tiny.scenes import Scene, Split, draw_scene, random_scene

BATCH_SIZE = 50


@dataclass(frozen=True)
class EvalQuestion:
    """A question about drawn scenes. `kind` tells questions about several images apart."""

    qa: QA
    images: Sequence[Image.Image]

    @property
    def kind(self) -> str:
        n = len(self.images)
        return self.qa.kind if n == 1 else f"{self.qa.kind}, {n} images"


def question_of_kind(rng: random.Random, kind: str, num_images: int, split: Split = "held_out") -> EvalQuestion:
    """Return a question of a kind about scenes of a split; scenes that allow no such question are drawn again."""
    while True:
        scenes: list[Scene] = [random_scene(rng, split) for _ in range(num_images)]
        try:
            return EvalQuestion(random_question(rng, scenes, kind), [draw_scene(scene, rng) for scene in scenes])
        except ValueError:
            continue


# By number of images, the kinds that the bundled model answers right at least nine times in ten.
SUPPORTED_KINDS: dict[int, list[str]] = {
    1: [kind for kind, entry in KINDS.items() if entry.about_one],
    2: [kind for kind in KINDS if kind not in ("count colour", "where")],
    3: ["count all", "colour", "shape", "at"],
}
# All that can be asked: the comparing kinds need several images, two of them exactly two.
ALL_KINDS = {
    1: SUPPORTED_KINDS[1],
    2: list(KINDS),
    3: [kind for kind in KINDS if kind not in ("total", "more")],
}


def build_questions(
    per_kind: int, seed: int, kinds: Mapping[int, Sequence[str]] = SUPPORTED_KINDS
) -> list[EvalQuestion]:
    """Return `per_kind` questions of every kind and number of images."""
    rng = random.Random(seed)
    return [question_of_kind(rng, kind, n) for _ in range(per_kind) for n in kinds for kind in kinds[n]]


@torch.inference_mode()
def greedy_answers(chat_model: ChatModel, batch: Sequence[EvalQuestion]) -> list[str]:
    """Return the greedy answers, computed in one ragged batch."""
    prompts = [torch.tensor(chat_model.prompt_ids(i.qa.question, len(i.images))) for i in batch]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    pixels = chat_model.preprocess_images([image for i in batch for image in i.images])
    return chat_model.tokenizer.batch_decode(
        chat_model.model.generate(ids, pixels, mask, max_new_tokens=64), skip_special_tokens=True
    )


def evaluate(chat_model: ChatModel, questions: Sequence[EvalQuestion]) -> dict[str, list[bool]]:
    """Return by kind which answers are right; shows progress on standard error."""
    correct: dict[str, list[bool]] = defaultdict(list)
    progress = Progress(unit=" questions")
    progress(0, len(questions))
    for offset in range(0, len(questions), BATCH_SIZE):
        batch = questions[offset : offset + BATCH_SIZE]
        for question, answer in zip(batch, greedy_answers(chat_model, batch), strict=True):
            correct[question.kind].append(answer == question.qa.answer)
        progress(offset + len(batch), len(questions))
    return correct


def accuracy_table(correct: Mapping[str, Sequence[bool]]) -> str:
    """Format the results of `evaluate` with a row for each kind."""
    lines = [f"{'kind':28}{'group':20}{'right':>8}{'of':>7}"]
    for kind, values in correct.items():
        group = KIND_GROUPS[kind.partition(",")[0]]
        lines.append(f"{kind:28}{group:20}{100 * sum(values) / len(values):7.1f}%{len(values):7}")
    all_values = [value for values in correct.values() for value in values]
    return "\n".join([*lines, f"{'all':48}{100 * sum(all_values) / len(all_values):7.2f}%{len(all_values):7}"])


def compare_kernels(chat_model: ChatModel, questions: Sequence[EvalQuestion], kernels: Mapping[str, str]) -> str:
    """Count the answers that are the same under these kernels and the default ones."""
    batches = [questions[i : i + BATCH_SIZE] for i in range(0, len(questions), BATCH_SIZE)]
    expected = [answer for batch in batches for answer in greedy_answers(chat_model, batch)]
    with use(**kernels), count_calls() as calls:
        answers = [answer for batch in batches for answer in greedy_answers(chat_model, batch)]
    ran = ", ".join(sorted(f"{op}={impl}" for op, impl in calls if kernels.get(op) == impl))
    same = sum(a == b for a, b in zip(answers, expected, strict=True))
    return f"{same} of {len(questions)} answers are the same under {ran}"


def run() -> None:
    """Evaluate a model as the command line says and print its accuracy, or the answers that other kernels change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT, help="a checkpoint folder (the bundled one)")
    parser.add_argument("--count", type=COUNT, default=100, help="questions of each kind and number of images (100)")
    parser.add_argument("--all", action="store_true", help="also the kinds that the bundled model gets wrong too often")
    parser.add_argument("--limit", type=COUNT, help="stop after this many questions")
    parser.add_argument("--seed", type=SEED, default=12345, help="of the questions (12345)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, help="of the KV cache (default: the model's)")
    parser.add_argument("--dtype", type=lambda name: parse_dtype(f"torch.{name}"), help="(default: the model's)")
    parser.add_argument(
        "--against",
        action="append",
        metavar="kernels.OP=NAME",
        help="count the answers that these kernels change (on a CPU, Triton needs TRITON_INTERPRET=1)",
    )
    add_kernels_argument(parser)
    args = parser.parse_args()
    discover_kernels(args)
    chat_model = load_chat_model(args.model, args.device, args.dtype)
    chat_model.model.config.kv_dtype = args.kv_dtype
    questions = build_questions(args.count, args.seed, ALL_KINDS if args.all else SUPPORTED_KINDS)[: args.limit]
    if args.against:
        print(compare_kernels(chat_model, questions, parse_kernel_settings(args.against)))
    else:
        print(accuracy_table(evaluate(chat_model, questions)))


def main() -> int:
    return exit_code("vila_triton.tiny.evaluate", run)


if __name__ == "__main__":
    sys.exit(main())
