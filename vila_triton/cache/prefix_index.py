"""The prefix cache's index: which pages hold which tokens, so that sequences with equal prefixes share pages. Plain
Python.

A token is represented by its prefix key: the id of a text token, or a negative hash for a position of an image (see
`images.feature_cache`). Keys and values depend on all tokens before, so a page is identified by its own tokens and a
hash of all tokens before it, chained from page to page (as in vLLM).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile

EMPTY_HASH = b""  # of no tokens


@dataclass(frozen=True)
class CachedPage:
    """The registered content of a page: the hash of all tokens before it, and the tokens in its first rows."""

    parent_hash: bytes
    tokens: tuple[int, ...]


def chain_hash(parent_hash: bytes, tokens: Sequence[int]) -> bytes:
    """Hash the tokens that follow those of `parent_hash`."""
    return blake2b(parent_hash + repr(tuple(tokens)).encode(), digest_size=16).digest()


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading tokens that two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


class PrefixIndex:
    """Finds pages by content, and the content of pages."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.pages: dict[int, CachedPage] = {}
        self.children: dict[bytes, dict[int, None]] = {}  # by hash of all tokens before: pages in order of insertion

    def match(self, tokens: list[int]) -> tuple[list[int], int]:
        """Find the pages with the longest registered prefix of `tokens`, and its length; the last page may hold more
        tokens.
        """
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
        """Register the tokens that pages hold. Errors: ValueError if a page is registered with others; nothing is
        inserted then.
        """
        parent_hash, new_entries = EMPTY_HASH, {}
        for i, page in enumerate(pages):
            rows = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
            entry = self.pages.get(page, CachedPage(parent_hash, ()))
            common = common_prefix_length(entry.tokens, rows)
            if entry.parent_hash != parent_hash or common < min(len(entry.tokens), len(rows)):
                raise ValueError(f"page {page} is registered with other tokens than these {len(rows)}")
            if len(rows) > len(entry.tokens):
                new_entries[page] = CachedPage(parent_hash, rows)
            parent_hash = chain_hash(parent_hash, rows)
        for page, new_entry in new_entries.items():
            self.pages[page] = new_entry
            self.children.setdefault(new_entry.parent_hash, {})[page] = None

    def num_known_tokens(self, page: int) -> int:
        """The number of registered tokens of a page."""
        return len(self.pages[page].tokens) if page in self.pages else 0

    def invalidate(self, page: int, num_valid: int = 0) -> None:
        """Remove a page from the index, or keep only its first `num_valid` tokens."""
        if (entry := self.pages.get(page)) is None:
            return
        if num_valid:
            self.pages[page] = CachedPage(entry.parent_hash, entry.tokens[:num_valid])
            return
        del self.pages[page], self.children[entry.parent_hash][page]
        if not self.children[entry.parent_hash]:
            del self.children[entry.parent_hash]
