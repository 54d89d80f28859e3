"""What the pages of a cache hold, known by content, so that equal beginnings are found again. Plain Python, no tensors.

A token is known by a number: a word by its id, a position of a picture by its name, which is below 0 and depends on the
picture's content (see `pictures`). Keys and values of a token depend on everything before it too. So a page is known by
the tokens in its rows together with a digest of all tokens before them, chained from page to page (as in vLLM).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile

EMPTY_HASH = b""  # the digest of nothing


@dataclass(frozen=True)
class CachedPage:
    """What is known of a page: the digest of all tokens before it, and those in its first rows."""

    parent_hash: bytes
    tokens: tuple[int, ...]


def chain_hash(parent_hash: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of the tokens behind those that `before` is the digest of."""
    return blake2b(parent_hash + repr(tuple(tokens)).encode(), digest_size=16).digest()


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


class PrefixIndex:
    """The content of pages, both ways: what a page holds, and which pages hold the beginning of a conversation."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.pages: dict[int, CachedPage] = {}
        self.children: dict[bytes, dict[int, None]] = {}  # the pages behind a beginning, in order of learning

    def match(self, tokens: list[int]) -> tuple[list[int], int]:
        """The pages that hold the longest known beginning of `tokens`, and its length; the last page may hold more."""
        pages, length, parent_hash = [], 0, EMPTY_HASH
        while length == len(pages) * self.page_size:
            next_tokens = tokens[length : length + self.page_size]
            matches = {
                page: common_prefix_length(self.pages[page].tokens, next_tokens)
                for page in self.children.get(parent_hash, ())
            }
            if not any(matches.values()):
                break
            pages.append(max(matches, key=lambda page: matches[page]))
            length += matches[pages[-1]]
            parent_hash = chain_hash(parent_hash, next_tokens)
        return pages, length

    def insert(self, pages: list[int], tokens: list[int]) -> None:
        """These pages hold these tokens. Errors: ValueError if one is known to hold others; nothing is learnt then."""
        parent_hash, new_entries = EMPTY_HASH, {}
        for i, page in enumerate(pages):
            rows = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
            entry = self.pages.get(page, CachedPage(parent_hash, ()))
            if entry.parent_hash != parent_hash or common_prefix_length(entry.tokens, rows) < min(
                len(entry.tokens), len(rows)
            ):
                raise ValueError(f"page {page} is known to hold other tokens than the {len(rows)} it is said to hold")
            if len(rows) > len(entry.tokens):
                new_entries[page] = CachedPage(parent_hash, rows)
            parent_hash = chain_hash(parent_hash, rows)
        for page, new_entry in new_entries.items():
            self.pages[page] = new_entry
            self.children.setdefault(new_entry.parent_hash, {})[page] = None

    def num_known_tokens(self, page: int) -> int:
        """How many rows of the page are known."""
        return len(self.pages[page].tokens) if page in self.pages else 0

    def invalidate(self, page: int, num_valid: int = 0) -> None:
        """Only the first `rows` of the page are still as they were."""
        if (entry := self.pages.get(page)) is None:
            return
        if num_valid:
            self.pages[page] = CachedPage(entry.parent_hash, entry.tokens[:num_valid])
            return
        del self.pages[page], self.children[entry.parent_hash][page]
        if not self.children[entry.parent_hash]:
            del self.children[entry.parent_hash]
