"""What the pages of a cache hold, known by content, so that equal beginnings are found again. Plain Python, no tensors.

A token is known by a number: a word by its id, a position of a picture by its name, which is below 0 and depends on the
picture's content (see `pictures`). Keys and values of a token depend on everything before it too. So a page is known by
the tokens in its rows together with a digest of all tokens before them, chained from page to page (as in vLLM).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile

START = b""  # the digest of nothing


@dataclass(frozen=True)
class Known:
    """What is known of a page: the digest of all tokens before it, and those in its first rows."""

    before: bytes
    tokens: tuple[int, ...]


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of the tokens behind those that `before` is the digest of."""
    return blake2b(before + repr(tuple(tokens)).encode(), digest_size=16).digest()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


class Prefixes:
    """The content of pages, both ways: what a page holds, and which pages hold the beginning of a conversation."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.known: dict[int, Known] = {}
        self.after: dict[bytes, dict[int, None]] = {}  # the pages behind a beginning, in order of learning

    def find(self, tokens: list[int]) -> tuple[list[int], int]:
        """The pages that hold the longest known beginning of `tokens`, and its length; the last page may hold more."""
        pages, length, before = [], 0, START
        while length == len(pages) * self.page_size:
            rest = tokens[length : length + self.page_size]
            found = {page: common(self.known[page].tokens, rest) for page in self.after.get(before, ())}
            if not any(found.values()):
                break
            pages.append(max(found, key=lambda page: found[page]))
            length += found[pages[-1]]
            before = digest(before, rest)
        return pages, length

    def learn(self, pages: list[int], tokens: list[int]) -> None:
        """These pages hold these tokens. Errors: ValueError if one is known to hold others; nothing is learnt then."""
        before, learnt = START, {}
        for i, page in enumerate(pages):
            rows = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
            old = self.known.get(page, Known(before, ()))
            if old.before != before or common(old.tokens, rows) < min(len(old.tokens), len(rows)):
                raise ValueError(f"page {page} is known to hold other tokens than the {len(rows)} it is said to hold")
            if len(rows) > len(old.tokens):
                learnt[page] = Known(before, rows)
            before = digest(before, rows)
        for page, known in learnt.items():
            self.known[page] = known
            self.after.setdefault(known.before, {})[page] = None

    def rows(self, page: int) -> int:
        """How many rows of the page are known."""
        return len(self.known[page].tokens) if page in self.known else 0

    def forget(self, page: int, rows: int = 0) -> None:
        """Only the first `rows` of the page are still as they were."""
        if (known := self.known.get(page)) is None:
            return
        if rows:
            self.known[page] = Known(known.before, known.tokens[:rows])
            return
        del self.known[page], self.after[known.before][page]
        if not self.after[known.before]:
            del self.after[known.before]
