"""Which page belongs to whom: the allocator of the paged cache. Plain Python, no tensors (Kwon et al. 2023)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from .prefix_index import Prefixes


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

    A page that several sequences share is never written: the one that appends to it is given a copy first. So is one
    that appends to a page of which more is known than it reads, while there are pages: what is known is lost only when
    they run out. A page of no sequence whose content is known is idle: it waits to be adopted, and is given away when
    no page is free, the one that was let go first going first. Pages promised to a sequence are given to no other.
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
        self.promised: dict[int, int] = {}  # by sequence: how long it may become
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
        """A new sequence with the same tokens, sharing all pages; returns its id. It is promised nothing.

        Errors: `OutOfPages` where a promise would then need one more, for a copy.
        """
        parent = self[seq]
        child = self.alloc()
        self.sequences[child] = Sequence(list(parent.pages), parent.length)
        self.references.update(parent.pages)
        if self.missing({}):
            self.free(child)
            raise OutOfPages(f"sequence {seq} cannot be forked: all {self.available} free pages are promised")
        return child

    def reorder(self, rows: list[int]) -> None:
        """All sequences are replaced: the i-th, in order of age, by a fork of what the rows[i]-th was; promises end.

        Errors: ValueError for a row that there is not, before anything is changed.
        """
        old = list(self.sequences)
        if bad := [row for row in rows if not 0 <= row < len(old)]:
            raise ValueError(f"there are {len(old)} sequences, and no row {bad[0]} among them")
        self.promised.clear()
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
        """Give an empty sequence the pages known to hold the longest beginning of `tokens`; returns its length, 0 also
        if promises need those pages.

        Errors: ValueError if the sequence is not empty.
        """
        idle = dict(self.idle)
        self._adopt(seq, tokens)
        if self.missing({}):
            self.truncate(seq, 0)
            self.idle = idle
        return self[seq].length

    def admit(self, known: Mapping[int, list[int]], new: int) -> int:
        """Promise each sequence room for these tokens, of which it holds the first, and `new` more; an empty one adopts
        what is known of all but the last. Returns how many pages lack; unless 0, nothing has changed.

        A promise takes the place of the one before it. It ends by `release`, or when the sequence is cut.
        """
        before, idle = self.promised, dict(self.idle)
        adopted = [seq for seq in known if not self[seq].length]
        for seq in adopted:
            self._adopt(seq, known[seq][:-1])
        self.promised = {**before, **{seq: len(tokens) + new for seq, tokens in known.items()}}
        if missing := self.missing({}):
            for seq in adopted:
                self.truncate(seq, 0)
            self.promised, self.idle = before, idle
        return missing

    def release(self, seq: int) -> None:
        """End what was promised to the sequence."""
        self.promised.pop(seq, None)

    def missing(self, counts: Mapping[int, int]) -> int:
        """Pages that lack for appending so many tokens to each sequence and keeping all promises."""
        left = {seq: max(0, total - self[seq].length) for seq, total in self.promised.items()}
        wanted = {seq: max(counts.get(seq, 0), left.get(seq, 0)) for seq in {**counts, **left}}
        return max(0, self.needed(wanted) - self.available)

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
        if self.missing(counts):
            raise self._out(counts)
        spare = self.available - fresh  # a copy that saves what is known takes one and gives back the page it is of
        slots, copies = [], []
        for seq, n in counts.items():
            s = self.sequences[seq]
            if n and (rows := s.length % self.page_size):
                last = s.pages[-1]
                saves = self.references[last] == 1 and self.prefixes.rows(last) > rows and spare > 0
                if saves or self.references[last] > 1:
                    spare -= saves
                    s.pages[-1] = self._take()
                    self._release(last)
                    copies.append((last, s.pages[-1]))
                else:
                    self.prefixes.forget(last, rows)
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
        self.release(seq)

    def free(self, seq: int) -> None:
        """Forget the sequence; what is known of its pages is kept."""
        self.truncate(seq, 0)
        del self.sequences[seq]

    def __getitem__(self, seq: int) -> Sequence:
        if seq not in self.sequences:
            raise KeyError(f"no sequence {seq} in the cache; there are: {list(self.sequences)}")
        return self.sequences[seq]

    def _adopt(self, seq: int, tokens: list[int]) -> None:
        s = self[seq]
        if s.length:
            raise ValueError(f"sequence {seq} has {s.length} tokens; only an empty one can adopt pages")
        s.pages, s.length = self.prefixes.find(tokens)
        self.references.update(s.pages)
        for page in s.pages:
            self.idle.pop(page, None)

    def _out(self, counts: Mapping[int, int]) -> OutOfPages:
        fresh = self.needed(counts)
        promised = self.missing(counts) + self.available - fresh
        return OutOfPages(
            f"{fresh} more pages of {self.page_size} tokens are needed, but {self.available} of {self.pages} "
            f"are free{f', {promised} of them promised to others' if promised else ''} "
            f"({len(self.sequences)} sequences hold the others)"
        )

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
