"""The page allocator of the KV cache (PagedAttention, Kwon et al. 2023). Plain Python, no tensors."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from .prefix_index import PrefixIndex


class OutOfPages(RuntimeError):
    """More pages are needed than are free; nothing was changed."""


@dataclass
class SequencePages:
    """The pages of one sequence in order, and the number of its tokens."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class SlotAllocation:
    """The result of an append: a slot for each new token, and pages (source, target) to copy before the first write."""

    slots: list[int]
    copies: list[tuple[int, int]]


class PageAllocator:
    """Assigns pages 0 to `num_pages` - 1 of `page_size` tokens to sequences, which may share pages.

    Pages are reference-counted and copied on write: a sequence that appends to a shared page gets a copy first. So does
    one that appends to a page with more registered tokens than it shares, as long as there are pages: a registered
    prefix is only lost when pages run out.

    A page that no sequence uses but whose content is registered is evictable: a sequence with the same prefix can reuse
    it, and it is evicted, least recently released first, when no free page is left. Pages reserved for a sequence are
    given to no other.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 0 or page_size < 1:
            raise ValueError(f"a page allocator needs pages >= 0 and page_size >= 1, got {num_pages} and {page_size}")
        self.page_size = page_size
        self.num_pages = num_pages
        self.free_pages = list(reversed(range(num_pages)))
        self.evictable: dict[int, None] = {}  # least recently used first
        self.prefix_index = PrefixIndex(page_size)
        self.ref_counts: Counter[int] = Counter()
        self.sequences: dict[int, SequencePages] = {}
        self.reserved_lens: dict[int, int] = {}  # by sequence: the length that pages are reserved for
        self._ids = count()

    @property
    def num_available_pages(self) -> int:
        """Pages that an append can take: free and evictable ones."""
        return len(self.free_pages) + len(self.evictable)

    def add_pages(self, num_pages: int) -> None:
        """Add free pages."""
        if num_pages < 0:
            raise ValueError(f"cannot add {num_pages} pages")
        self.free_pages[:0] = reversed(range(self.num_pages, self.num_pages + num_pages))
        self.num_pages += num_pages

    def add_sequence(self) -> int:
        """Add an empty sequence; returns its id, which is never used again."""
        seq = next(self._ids)
        self.sequences[seq] = SequencePages()
        return seq

    def fork(self, seq: int) -> int:
        """Add a sequence with the same tokens that shares their pages; returns its id. Nothing is reserved for it.

        Errors: `OutOfPages` if the copy of a shared page would take a page that is reserved.
        """
        parent = self[seq]
        child = self.add_sequence()
        pages = parent.pages[: -(-parent.length // self.page_size)]  # none that was granted ahead, see `unsettle`
        self.sequences[child] = SequencePages(pages, parent.length)
        self.ref_counts.update(pages)
        if self.num_pages_missing({}):
            self.free_sequence(child)
            raise OutOfPages(f"sequence {seq} cannot be forked: all {self.num_available_pages} free pages are reserved")
        return child

    def reorder(self, rows: list[int]) -> None:
        """Replace all sequences: the i-th, in order of age, by a fork of the present rows[i]-th. Reservations end.

        Errors: ValueError for a row that does not exist, before anything is changed.
        """
        old = list(self.sequences)
        if bad := [row for row in rows if not 0 <= row < len(old)]:
            raise ValueError(f"there are {len(old)} sequences, and no row {bad[0]} among them")
        self.reserved_lens.clear()
        for row in rows:
            self.fork(old[row])
        for seq in old:
            self.free_sequence(seq)

    def register_prefix(self, seq: int, tokens: list[int]) -> None:
        """Register the content of the first tokens of a sequence, by their prefix keys, for other sequences to reuse.

        Errors: ValueError if the sequence has fewer tokens, or shares a page that is registered with other content.
        """
        s = self[seq]
        if len(tokens) > s.length:
            raise ValueError(f"sequence {seq} has {s.length} tokens; {len(tokens)} of them cannot be registered")
        self.prefix_index.insert(s.pages[: -(-len(tokens) // self.page_size)], tokens)

    def reuse_prefix(self, seq: int, tokens: list[int]) -> int:
        """Give an empty sequence the pages with the longest registered prefix of `tokens`; returns its length.

        It is 0 if reservations need those pages. Errors: ValueError if the sequence is not empty.
        """
        old_evictable = dict(self.evictable)
        self._reuse_prefix(seq, tokens)
        if self.num_pages_missing({}):
            self.truncate(seq, 0)
            self.evictable = old_evictable
        return self[seq].length

    def admit(self, keys: Mapping[int, list[int]], max_new_tokens: int) -> int:
        """Reserve pages for each sequence: for the tokens of its prompt, by their prefix keys, and `max_new_tokens`
        more.

        An empty sequence first reuses the longest registered prefix of all its tokens but the last. Returns the number
        of pages that are missing; unless it is 0, nothing has changed. A reservation replaces the one before it, and
        ends with `release_reservation` or when the sequence is truncated.
        """
        old_reserved, old_evictable = self.reserved_lens, dict(self.evictable)
        reusing = [seq for seq in keys if not self[seq].length]
        for seq in reusing:
            self._reuse_prefix(seq, keys[seq][:-1])
        self.reserved_lens = {**old_reserved, **{seq: len(tokens) + max_new_tokens for seq, tokens in keys.items()}}
        if missing := self.num_pages_missing({}):
            for seq in reusing:
                self.truncate(seq, 0)
            self.reserved_lens, self.evictable = old_reserved, old_evictable
        return missing

    def release_reservation(self, seq: int) -> None:
        """End the reservation of a sequence."""
        self.reserved_lens.pop(seq, None)

    def num_pages_missing(self, counts: Mapping[int, int]) -> int:
        """Pages that are missing to append so many tokens to each sequence and keep all reservations."""
        remaining = {seq: max(0, total - self[seq].length) for seq, total in self.reserved_lens.items()}
        new_tokens = {seq: max(counts.get(seq, 0), remaining.get(seq, 0)) for seq in {**counts, **remaining}}
        return max(0, self.num_pages_needed(new_tokens) - self.num_available_pages)

    def num_pages_needed(self, counts: Mapping[int, int]) -> int:
        """Available pages that appending so many tokens to each sequence would take."""
        fresh, copied = 0, Counter[int]()
        for seq, n in counts.items():
            s = self[seq]
            if n < 0:
                raise ValueError(f"cannot append {n} tokens to sequence {seq}")
            if n and s.length % self.page_size and self.ref_counts[s.pages[-1]] - copied[s.pages[-1]] > 1:
                copied[s.pages[-1]] += 1
                fresh += 1
            fresh += max(0, -(-(s.length + n) // self.page_size) - len(s.pages))
        return fresh

    def append(self, counts: Mapping[int, int]) -> SlotAllocation:
        """Allocate slots for so many new tokens of each sequence: for all of them or, with `OutOfPages`, for none."""
        fresh = self.num_pages_needed(counts)
        if self.num_pages_missing(counts):
            raise self._out_of_pages(counts)
        spare = self.num_available_pages - fresh  # copies that keep a registered prefix come out of these
        slots, copies = [], []
        for seq, n in counts.items():
            s = self.sequences[seq]
            if n and (rows := s.length % self.page_size):
                last = s.pages[-1]
                known = self.prefix_index.num_known_tokens(last)
                keeps_prefix = self.ref_counts[last] == 1 and known > rows and spare > 0
                if keeps_prefix or self.ref_counts[last] > 1:
                    spare -= keeps_prefix
                    s.pages[-1] = self._take_page()
                    self._release_page(last)
                    copies.append((last, s.pages[-1]))
                else:
                    self.prefix_index.invalidate(last, rows)
            s.pages += [self._take_page() for _ in range(-(-(s.length + n) // self.page_size) - len(s.pages))]
            slots += [
                s.pages[t // self.page_size] * self.page_size + t % self.page_size
                for t in range(s.length, s.length + n)
            ]
            s.length += n
        return SlotAllocation(slots, copies)

    def unsettle(self, seq: int) -> None:
        """Let the last token that was appended not count until `settle`, as nobody knows yet whether it stays; its page
        remains with the sequence until it is truncated.
        """
        self[seq].length -= 1

    def settle(self, seq: int) -> None:
        """Let the token count whose page the sequence has had since `unsettle`."""
        self[seq].length += 1

    def truncate(self, seq: int, length: int) -> None:
        """Drop all tokens from `length` on, and pages that no token counts in. Errors: ValueError if the sequence is
        shorter.
        """
        s = self[seq]
        if not 0 <= length <= s.length:
            raise ValueError(f"sequence {seq} has {s.length} tokens; it cannot be cut to {length}")
        keep = -(-length // self.page_size)
        for page in reversed(s.pages[keep:]):  # later pages first: a prefix is only useful with all pages before it
            self._release_page(page)
        s.pages, s.length = s.pages[:keep], length
        self.release_reservation(seq)

    def free_sequence(self, seq: int) -> None:
        """Remove a sequence; registered content of its pages stays until it is evicted."""
        self.truncate(seq, 0)
        del self.sequences[seq]

    def __getitem__(self, seq: int) -> SequencePages:
        if seq not in self.sequences:
            raise KeyError(f"no sequence {seq} in the cache; there are: {list(self.sequences)}")
        return self.sequences[seq]

    def _reuse_prefix(self, seq: int, tokens: list[int]) -> None:
        s = self[seq]
        if s.length:
            raise ValueError(f"sequence {seq} has {s.length} tokens; only an empty one can reuse pages")
        s.pages, s.length = self.prefix_index.match(tokens)
        self.ref_counts.update(s.pages)
        for page in s.pages:
            self.evictable.pop(page, None)

    def _out_of_pages(self, counts: Mapping[int, int]) -> OutOfPages:
        fresh = self.num_pages_needed(counts)
        reserved = self.num_pages_missing(counts) + self.num_available_pages - fresh
        return OutOfPages(
            f"{fresh} more pages of {self.page_size} tokens are needed, but {self.num_available_pages} of "
            f"{self.num_pages} are free{f', {reserved} of them reserved for others' if reserved else ''} "
            f"({len(self.sequences)} sequences hold the others)"
        )

    def _take_page(self) -> int:
        if self.free_pages:
            page = self.free_pages.pop()
        else:
            page = next(iter(self.evictable))
            del self.evictable[page]
            self.prefix_index.invalidate(page)
        self.ref_counts[page] = 1
        return page

    def _release_page(self, page: int) -> None:
        self.ref_counts[page] -= 1
        if not self.ref_counts[page]:
            del self.ref_counts[page]
            if page in self.prefix_index.pages:
                self.evictable[page] = None
            else:
                self.free_pages.append(page)
