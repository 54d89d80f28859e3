"""Draws the example pictures: `python -m vila_triton.tiny.examples`. Their layouts are held out of training."""

import random
from pathlib import Path

from vila_triton.tiny.questions import describe
from vila_triton.tiny.scenes import draw, sample

FOLDER = Path(__file__).resolve().parent / "examples"


def main() -> None:
    rng = random.Random(2)
    FOLDER.mkdir(exist_ok=True)
    for name in ("a", "b", "c", "d"):
        scene = sample(rng, "held_out")
        while len(scene.things) < 3:
            scene = sample(rng, "held_out")
        draw(scene, rng).save(FOLDER / f"{name}.png")
        print(f"{name}.png: {describe(scene)}")


if __name__ == "__main__":
    main()
