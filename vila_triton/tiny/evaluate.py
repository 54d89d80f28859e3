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

from vila_triton.arguments import KV_DTYPES, choices
from vila_triton.chat.conversation import Talker
from vila_triton.console import bar, exit_code
from vila_triton.hf.configuration_vila_llama import parse_dtype
from vila_triton.limits import COUNT, SEED
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import recording, use
from vila_triton.tiny.questions import GROUPS, KINDS, QA, ask
from vila_triton.tiny.scenes import Scene, draw, sample

BATCH = 50


@dataclass(frozen=True)
class Item:
    """A question about drawn scenes."""

    qa: QA
    pictures: Sequence[Image.Image]

    @property
    def kind(self) -> str:
        n = len(self.pictures)
        return self.qa.kind if n == 1 else f"{self.qa.kind}, {n} pictures"


def item(rng: random.Random, kind: str, pictures: int) -> Item:
    """A question of a kind about that many held-out scenes; scenes that allow none are drawn again."""
    while True:
        scenes: list[Scene] = [sample(rng, "held_out") for _ in range(pictures)]
        try:
            return Item(ask(rng, scenes, kind), [draw(scene, rng) for scene in scenes])
        except ValueError:
            continue


# What the bundled model is offered for, by number of pictures: what it gets right at least nine times in ten.
SHIPPED: dict[int, list[str]] = {
    1: [kind for kind, entry in KINDS.items() if entry.about],
    2: [kind for kind in KINDS if kind not in ("count colour", "where")],
    3: ["count all", "colour", "shape", "at"],
}
# Everything that can be asked: the comparing kinds need several pictures, two of them just two.
ALL = {
    1: SHIPPED[1],
    2: list(KINDS),
    3: [kind for kind in KINDS if kind not in ("total", "more")],
}


def items(count: int, seed: int, kinds: Mapping[int, Sequence[str]] = SHIPPED) -> list[Item]:
    """That many questions of every kind and number of pictures."""
    rng = random.Random(seed)
    return [item(rng, kind, n) for _ in range(count) for n in kinds for kind in kinds[n]]


@torch.inference_mode()
def answers(talker: Talker, batch: Sequence[Item]) -> list[str]:
    """Greedy answers, all in one ragged batch."""
    prompts = [torch.tensor(talker.prompt(i.qa.question, len(i.pictures))) for i in batch]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    pixels = talker.pixels([picture for i in batch for picture in i.pictures])
    return talker.tokenizer.batch_decode(
        talker.model.generate(ids, pixels, mask, max_new_tokens=64), skip_special_tokens=True
    )


def evaluate(talker: Talker, questions: Sequence[Item]) -> dict[str, list[bool]]:
    """Right or wrong for every question, by kind; shows progress on standard error."""
    right: dict[str, list[bool]] = defaultdict(list)
    start = time.monotonic()
    for at in range(0, len(questions), BATCH):
        batch = questions[at : at + BATCH]
        for question, answer in zip(batch, answers(talker, batch), strict=True):
            right[question.kind].append(answer == question.qa.answer)
        done = at + len(batch)
        left = (time.monotonic() - start) / done * (len(questions) - done)
        bar(f"{done} of {len(questions)} questions, {left:.0f} s left", done == len(questions))
    return right


def report(right: Mapping[str, Sequence[bool]]) -> str:
    lines = [f"{'kind':28}{'group':20}{'right':>8}{'of':>7}"]
    for kind, values in right.items():
        group = GROUPS[kind.partition(",")[0]]
        lines.append(f"{kind:28}{group:20}{100 * sum(values) / len(values):7.1f}%{len(values):7}")
    every = [value for values in right.values() for value in values]
    return "\n".join([*lines, f"{'all':48}{100 * sum(every) / len(every):7.2f}%{len(every):7}"])


def agreement(talker: Talker, questions: Sequence[Item], kernels: Mapping[str, str]) -> str:
    """How many answers the given kernels and the default ones share."""
    expected = [a for at in range(0, len(questions), BATCH) for a in answers(talker, questions[at : at + BATCH])]
    with use(**kernels), recording() as calls:
        got = [a for at in range(0, len(questions), BATCH) for a in answers(talker, questions[at : at + BATCH])]
    ran = ", ".join(sorted(f"{op}={impl}" for op, impl in calls if kernels.get(op) == impl))
    return f"{sum(map(str.__eq__, got, expected))} of {len(questions)} answers are the same under {ran}"


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
    talker = Talker.from_pretrained(args.model, args.device, args.dtype)
    talker.model.config.kv_dtype = args.kv_dtype
    questions = items(args.count, args.seed, ALL if args.all else SHIPPED)[: args.limit]
    if args.against:
        print(agreement(talker, questions, choices(args.against)))
    else:
        print(report(evaluate(talker, questions)))


def main() -> int:
    return exit_code("vila_triton.tiny.evaluate", run)


if __name__ == "__main__":
    sys.exit(main())
