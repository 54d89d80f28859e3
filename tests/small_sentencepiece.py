"""SentencePiece models as LLaMA's are (no text is changed, what is unknown is bytes), trained on Python's manual."""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

LINES = [line for page in topics.values() for line in page.splitlines() if line.strip()][:1500]
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
KINDS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram", "vocab_size": 500, "byte_fallback": True},
    "bpe": {"model_type": "bpe", "vocab_size": 600, "byte_fallback": True},
    "marked": {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True}
    | {"user_defined_symbols": ["<|im_start|>", "<|im_end|>"]},  # as Yi's, on which VILA1.5-40b is built
    "small": {"model_type": "unigram", "vocab_size": 120},  # for the bundled model's 128 tokens
}


@cache
def trained(kind: str) -> bytes:
    from io import BytesIO

    held = BytesIO()
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(LINES), model_writer=held, minloglevel=2, **LLAMA, **KINDS[kind]
    )
    return held.getvalue()


def place(folder: Path, kind: str) -> SentencePieceProcessor:
    """Write a folder that holds a tokenizer.model and nothing else, and give what the library makes of it."""
    (folder / "tokenizer.model").write_bytes(trained(kind))
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))  # pyright: ignore[reportCallIssue]


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Random ones with pictures between words, spaces of all kinds, letters that no model knows, and digits."""
    rng, words = random.Random(seed), [word for line in LINES for word in line.split()]
    others = [
        " ",
        "  ",
        "    ",
        "\n",
        "\n\n",
        "\t",
        "<image>",
        "<image>\n",
        " <image> ",
        "▁",
        "é",
        "日本",
        "🙂",
        "\u200b",
    ]
    others += ["1234", "<0x0A>", "USER:", "<", "s)", "I'm", "\x00", "\ufeff", "\u00a0"]
    for _ in range(count):
        parts = rng.choices((0, 1), (2, 3), k=rng.randint(0, 12))
        yield "".join(rng.choice(words) + rng.choice(["", " "]) if word else rng.choice(others) for word in parts)
