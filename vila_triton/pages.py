"""Which page belongs to whom: the allocator of the paged cache. Plain Python, no tensors (Kwon et al. 2023)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from .prefix import Prefixes


class OutOfPages(RuntimeError):
    """More pages are needed than are free; nothing was changed."""


@dataclass
class Sequence:
    """The pages of one sequence in order, and how many tokens it has in them."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Grant:
    """What an append was given: a slot for each new token, and pages (from, to) to be copied before the first write."""

    slots: list[int]
    copies: list[tuple[int, int]]


class PageTable:
    """Pages 0 to `pages` - 1 of `page_size` tokens each, shared by sequences through reference counts.

    A page that several sequences share is never written: the one that appends to it is given a copy first. A page of no
    sequence whose content is known is idle: it waits to be adopted, and is given away when no page is free, the one
    that was let go first going first.
    """

    def __init__(self, pages: int, page_size: int):
        if pages < 0 or page_size < 1:
            raise ValueError(f"a page table needs pages >= 0 and page_size >= 1, got {pages} and {page_size}")
        self.page_size = page_size
        self.pages = pages
        self.free_pages = list(reversed(range(pages)))
        self.idle: dict[int, None] = {}  # least recently used first
        self.prefixes = Prefixes(page_size)
        self.references: Counter[int] = Counter()
        self.sequences: dict[int, Sequence] = {}
        self._ids = count()

    @property
    def available(self) -> int:
        """Pages that an append can be given: the free ones and the idle ones."""
        return len(self.free_pages) + len(self.idle)

    def grow(self, pages: int) -> None:
        """Add that many free pages."""
        if pages < 0:
            raise ValueError(f"cannot add {pages} pages")
        self.free_pages[:0] = reversed(range(self.pages, self.pages + pages))
        self.pages += pages

    def alloc(self) -> int:
        """A new empty sequence; returns its id, which is never used again."""
        seq = next(self._ids)
        self.sequences[seq] = Sequence()
        return seq

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens, sharing all pages; returns its id."""
        parent = self[seq]
        child = self.alloc()
        self.sequences[child] = Sequence(list(parent.pages), parent.length)
        self.references.update(parent.pages)
        return child

    def reorder(self, rows: list[int]) -> None:
        """All sequences are replaced: the i-th, in order of age, by a fork of what the rows[i]-th was.

        Errors: ValueError for a row that there is not, before anything is changed.
        """
        old = list(self.sequences)
        if bad := [row for row in rows if not 0 <= row < len(old)]:
            raise ValueError(f"there are {len(old)} sequences, and no row {bad[0]} among them")
        for row in rows:
            self.fork(old[row])
        for seq in old:
            self.free(seq)

    def publish(self, seq: int, tokens: list[int]) -> None:
        """Make known that the first tokens of the sequence are these, as they lie in its pages, for others to adopt.

        Errors: ValueError if it has fewer, or shares a page that is known to hold others.
        """
        s = self[seq]
        if len(tokens) > s.length:
            raise ValueError(f"sequence {seq} has {s.length} tokens; {len(tokens)} of them cannot be known")
        self.prefixes.learn(s.pages[: -(-len(tokens) // self.page_size)], tokens)

    def adopt(self, seq: int, tokens: list[int]) -> int:
        """Give an empty sequence the pages known to hold the longest beginning of `tokens`; returns its length.

        Errors: ValueError if the sequence is not empty.
        """
        s = self[seq]
        if s.length:
            raise ValueError(f"sequence {seq} has {s.length} tokens; only an empty one can adopt pages")
        s.pages, s.length = self.prefixes.find(tokens)
        self.references.update(s.pages)
        for page in s.pages:
            self.idle.pop(page, None)
        return s.length

    def needed(self, counts: Mapping[int, int]) -> int:
        """Available pages that appending so many tokens to each sequence would take."""
        fresh, left = 0, Counter[int]()
        for seq, n in counts.items():
            s = self[seq]
            if n < 0:
                raise ValueError(f"cannot append {n} tokens to sequence {seq}")
            if n and s.length % self.page_size and self.references[s.pages[-1]] - left[s.pages[-1]] > 1:
                left[s.pages[-1]] += 1
                fresh += 1
            fresh += -(-(s.length + n) // self.page_size) - len(s.pages)
        return fresh

    def append(self, counts: Mapping[int, int]) -> Grant:
        """Room for so many more tokens in each sequence, for all of them or, with `OutOfPages`, for none."""
        fresh = self.needed(counts)
        if fresh > self.available:
            raise OutOfPages(
                f"{fresh} more pages of {self.page_size} tokens are needed, but {self.available} of {self.pages} "
                f"are free ({len(self.sequences)} sequences hold the others)"
            )
        slots, copies = [], []
        for seq, n in counts.items():
            s = self.sequences[seq]
            if n and s.length % self.page_size:
                last = s.pages[-1]
                if self.references[last] > 1:
                    s.pages[-1] = self._take()
                    self._release(last)
                    copies.append((last, s.pages[-1]))
                else:
                    self.prefixes.forget(last, s.length % self.page_size)
            s.pages += [self._take() for _ in range(-(-(s.length + n) // self.page_size) - len(s.pages))]
            slots += [
                s.pages[t // self.page_size] * self.page_size + t % self.page_size
                for t in range(s.length, s.length + n)
            ]
            s.length += n
        return Grant(slots, copies)

    def truncate(self, seq: int, length: int) -> None:
        """Forget all tokens from `length` on. Errors: ValueError if the sequence is shorter than that."""
        s = self[seq]
        if not 0 <= length <= s.length:
            raise ValueError(f"sequence {seq} has {s.length} tokens; it cannot be cut to {length}")
        keep = -(-length // self.page_size)
        for page in reversed(s.pages[keep:]):  # a page is of use only after those before it, so they go last
            self._release(page)
        s.pages, s.length = s.pages[:keep], length

    def free(self, seq: int) -> None:
        """Forget the sequence; what is known of its pages is kept."""
        self.truncate(seq, 0)
        del self.sequences[seq]

    def __getitem__(self, seq: int) -> Sequence:
        if seq not in self.sequences:
            raise KeyError(f"no sequence {seq} in the cache; there are: {list(self.sequences)}")
        return self.sequences[seq]

    def _take(self) -> int:
        if self.free_pages:
            page = self.free_pages.pop()
        else:
            page = next(iter(self.idle))
            del self.idle[page]
            self.prefixes.forget(page)
        self.references[page] = 1
        return page

    def _release(self, page: int) -> None:
        self.references[page] -= 1
        if not self.references[page]:
            del self.references[page]
            if page in self.prefixes.known:
                self.idle[page] = None
            else:
                self.free_pages.append(page)
