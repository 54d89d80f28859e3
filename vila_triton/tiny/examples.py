"""Draw the example images: `python -m vila_triton.tiny.examples`. Their layouts are held out of training."""

import random
import sys
from pathlib import Path

from vila_triton.console import exit_code
from vila_triton.tiny.questions import describe
from vila_triton.tiny.scenes import draw_scene, random_scene

EXAMPLES_DIR = Path(__file__).resolve().parent / "examples"


def run() -> None:
    """Draw four scenes of at least three things each and write them to `EXAMPLES_DIR` as PNG files."""
    rng = random.Random(2)
    EXAMPLES_DIR.mkdir(exist_ok=True)
    for name in ("a", "b", "c", "d"):
        scene = random_scene(rng, "held_out")
        while len(scene.things) < 3:
            scene = random_scene(rng, "held_out")
        draw_scene(scene, rng).save(EXAMPLES_DIR / f"{name}.png")
        print(f"{name}.png: {describe(scene)}")


def main() -> int:
    return exit_code("vila_triton.tiny.examples", run)


if __name__ == "__main__":
    sys.exit(main())
