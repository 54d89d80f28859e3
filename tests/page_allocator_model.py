"""A page table, a memory that is written as it grants, and a model of both: dicts of lists that know no pages.

What a slot holds is the whole beginning of the conversation up to its token, as keys and values depend on all of it.
"""

from collections import Counter
from itertools import takewhile

import pytest

from vila_triton.cache.page_allocator import OutOfPages, PageAllocator

Tokens = tuple[int, ...]


def beginning(a: Tokens, b: list[int]) -> Tokens:
    """Return the tokens that both begin with."""
    return tuple(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


class World:
    """Each method does something to the table and asserts that all it says and changes is as the model has it."""

    def __init__(self, pages: int, page_size: int):
        self.allocator = PageAllocator(pages, page_size)
        self.total, self.size = pages, page_size
        self.expected: dict[int, list[int]] = {}  # what each sequence must read
        self.memory: dict[int, Tokens] = {}  # by slot
        self.known: dict[int, Tokens] = {}  # by page: the published tokens up to its last known row
        self.unused: list[int] = []  # pages of no sequence whose content is known, the one let go first at the front
        self.promised: dict[int, int] = {}  # by sequence: how long it may become
        self.ids: set[int] = set()

    def born(self, seq: int, tokens: list[int]) -> int:
        assert seq not in self.ids, "an id was used again"
        self.ids.add(seq)
        self.expected[seq] = tokens
        return seq

    def alloc(self) -> int:
        return self.born(self.allocator.add_sequence(), [])

    def fork(self, parent: int) -> int | None:
        """None if a promise to the parent leaves no page for the copy of the one in which they will part."""
        before = self.snapshot()
        try:
            child = self.allocator.fork(parent)
        except OutOfPages as error:
            assert str(error).startswith(f"sequence {parent} cannot be forked: all ")
            assert self.owed() == self.allocator.num_available_pages and self.promised.get(parent, 0) > len(
                self.expected[parent]
            )
            assert before == self.snapshot(), "a refused fork changed something"
            return None
        return self.born(child, list(self.expected[parent]))

    def free(self, seq: int) -> None:
        self.let_go(seq, 0)
        self.allocator.free_sequence(seq)
        del self.expected[seq]
        self.promised.pop(seq, None)
        with pytest.raises(KeyError, match=f"no sequence {seq}"):
            self.allocator.free_sequence(seq)

    def grow(self, pages: int) -> None:
        self.allocator.add_pages(pages)
        self.total += pages

    def let_go(self, seq: int, length: int) -> None:
        """The model's side of a truncation: pages that nobody needs then wait, the tail of the sequence first."""
        for page in reversed(self.allocator[seq].pages[-(-length // self.size) :]):
            if self.allocator.ref_counts[page] == 1 and page in self.known:
                self.unused.append(page)

    def truncate(self, seq: int, length: int) -> None:
        self.let_go(seq, length)
        self.allocator.truncate(seq, length)
        self.promised.pop(seq, None)
        del self.expected[seq][length:]

    def truncate_wrongly(self, seq: int, length: int) -> None:
        before = self.snapshot()
        with pytest.raises(ValueError, match=f"sequence {seq} has {len(self.expected[seq])} tokens.*{length}"):
            self.allocator.truncate(seq, length)
        assert before == self.snapshot()

    def publish(self, seq: int, length: int) -> None:
        tokens = self.expected[seq][:length]
        self.allocator.register_prefix(seq, tokens)
        for i, page in enumerate(self.allocator[seq].pages[: -(-length // self.size)]):
            whole = tuple(tokens[: (i + 1) * self.size])
            self.known[page] = max(self.known.get(page, ()), whole, key=len)

    def publish_a_lie(self, seq: int, at: int) -> None:
        """Publishing other tokens than a page is known to hold, or more than there are, is refused."""
        tokens, before = list(self.expected[seq]), self.snapshot()
        with pytest.raises(ValueError, match=f"sequence {seq} has {len(tokens)} tokens"):
            self.allocator.register_prefix(seq, [*tokens, 0])
        if at < len(tokens) and at < len(self.known.get(self.allocator[seq].pages[at // self.size], ())):
            tokens[at] += 100
            with pytest.raises(ValueError, match="is registered with other tokens"):
                self.allocator.register_prefix(seq, tokens)
        assert before == self.snapshot()

    def longest(self, tokens: list[int]) -> int:
        """Return the length of the longest prefix of the tokens that known pages hold, by trying them all."""
        length = 0
        while length % self.size == 0:
            here = [page for page in self.known.values() if length < len(page) <= length + self.size]
            longest = max((len(beginning(page, tokens)) for page in here), default=0)
            if longest <= length:
                break
            length = longest
        return length

    def needed(self, counts: dict[int, int]) -> int:
        """Pages that appending takes: to grow by, and for copies of a shared page for all but its last writer."""
        writers, grown = Counter[int](), 0
        for seq, n in counts.items():
            pages, length = self.allocator[seq].pages, len(self.expected[seq])
            grown += -(-(length + n) // self.size) - len(pages)
            if n and length % self.size:
                writers[pages[-1]] += 1
        return grown + sum(min(n, self.allocator.ref_counts[page] - 1) for page, n in writers.items())

    def owed(self, counts: dict[int, int] | None = None) -> int:
        """Pages needed for what is promised and for so many tokens more."""
        left = {seq: max(0, n - len(self.expected[seq])) for seq, n in self.promised.items()}
        counts = counts or {}
        return self.needed({seq: max(counts.get(seq, 0), left.get(seq, 0)) for seq in {**counts, **left}})

    def release(self, seq: int) -> None:
        self.allocator.release_reservation(seq)
        self.promised.pop(seq, None)

    def admit(self, asked: dict[int, list[int]], new: int) -> None:
        """Promises to sequences that go on with these tokens; empty ones adopt what is known of them."""
        known = {seq: [*self.expected[seq], *more] for seq, more in asked.items()}
        begun = {seq: tokens[: self.longest(tokens[:-1])] for seq, tokens in known.items() if not self.expected[seq]}
        before, promised = self.snapshot(), dict(self.promised)
        missing = self.allocator.admit(known, new)
        if missing:
            assert before == self.snapshot(), "a refused promise changed something"
            return
        for seq, tokens in begun.items():
            assert self.allocator[seq].length == len(tokens), "not the longest known beginning"
            self.expected[seq] = tokens
        self.promised = {**promised, **{seq: len(tokens) + new for seq, tokens in known.items()}}
        self.unused = [page for page in self.unused if not self.allocator.ref_counts[page]]

    def adopt(self, tokens: list[int]) -> int:
        """A new sequence over what is known of these tokens."""
        seq, length = self.alloc(), self.longest(tokens)
        adopted = self.allocator.reuse_prefix(seq, tokens)
        if adopted < length:
            assert not adopted and self.promised, "not the longest known beginning"
            return seq
        self.expected[seq] = tokens[:length]
        self.unused = [page for page in self.unused if page not in self.allocator[seq].pages]
        if length:
            with pytest.raises(ValueError, match=f"sequence {seq} has {length} tokens; only an empty one"):
                self.allocator.reuse_prefix(seq, tokens)
        return seq

    def append(self, new: dict[int, list[int]]) -> None:
        counts = {seq: len(tokens) for seq, tokens in new.items()}
        before, lengths = self.snapshot(), {seq: len(self.expected[seq]) for seq in new}
        free, waiting = list(self.allocator.free_pages), list(self.unused)
        needed, owed = self.allocator.num_pages_needed(counts), self.owed(counts)
        available = len(free) + len(waiting)
        assert needed == self.needed(counts)
        assert before == self.snapshot(), "counting changed something"
        if owed > available:
            kept = f", {owed - needed} of them reserved for others" if owed > needed else ""
            message = f"^{needed} more pages .* {available} of {self.total} are free{kept} "
            with pytest.raises(OutOfPages, match=message):
                self.allocator.append(counts)
            assert before == self.snapshot(), "a refused append changed something"
            assert any(length + counts[seq] > self.promised.get(seq, 0) for seq, length in lengths.items() if new[seq])
            return
        grant = self.allocator.append(counts)
        saved = [source for source in dict(grant.copies) if not self.allocator.ref_counts[source]]
        evicted = waiting[: max(0, needed + len(saved) - len(free))]
        self.unused = [*waiting[len(evicted) :], *saved]
        assert available - self.allocator.num_available_pages == needed
        assert len(grant.slots) == len(set(grant.slots)) == sum(counts.values())
        for page in evicted:
            del self.known[page]
        for source, target in grant.copies:
            assert target in free + evicted, "a copy went to a page that was in use"
            for row in range(self.size):
                self.memory[target * self.size + row] = self.memory.get(source * self.size + row, (-1,))
        slots = iter(grant.slots)
        for seq, tokens in new.items():
            for token in tokens:
                page = (slot := next(slots)) // self.size
                assert self.allocator.ref_counts[page] == 1, "a shared page was written"
                self.expected[seq].append(token)
                self.memory[slot] = tuple(self.expected[seq])
                if len(self.known.get(page, ())) > lengths[seq]:  # what its rows held before is not known any more
                    assert len(saved) == available - needed, "what is known was lost though there are pages"
                    self.known[page] = self.known[page][: lengths[seq]]

    def run_ahead(self, seq: int, token: int, stays: bool) -> None:
        """Append a token that does not count before it is known whether it stays."""
        length = len(self.expected[seq])
        self.append({seq: [token]})
        if len(self.expected[seq]) == length:  # there was no page for it
            return
        self.allocator.unsettle(seq)
        assert self.allocator[seq].length == length and not self.allocator.num_pages_needed({seq: 0})
        with pytest.raises(ValueError, match=f"sequence {seq} has {length} tokens"):
            self.allocator.register_prefix(seq, self.expected[seq])
        if stays:
            self.allocator.settle(seq)
        else:
            self.truncate(seq, length)

    def snapshot(self) -> object:
        table = self.allocator
        sequences = {seq: (list(s.pages), s.length) for seq, s in table.sequences.items()}
        held = list(table.free_pages), list(table.evictable), dict(table.ref_counts), dict(table.reserved_lens)
        return *held, sequences, dict(table.prefix_index.pages)

    def every_sequence_reads_its_own_tokens(self) -> None:
        assert self.allocator.sequences.keys() == self.expected.keys()
        for seq, tokens in self.expected.items():
            pages, whole = self.allocator[seq].pages, tuple(tokens)
            assert self.allocator[seq].length == len(tokens)
            assert len(pages) == -(-len(tokens) // self.size), "a page is held without need"
            for i in range(len(tokens)):
                assert self.memory[pages[i // self.size] * self.size + i % self.size] == whole[: i + 1]

    def every_page_is_free_or_idle_or_counted(self) -> None:
        table = self.allocator
        held = Counter(page for s in table.sequences.values() for page in s.pages)
        assert held == table.ref_counts
        assert list(table.evictable) == self.unused, "idle pages are not in the order in which they were let go"
        assert (
            sorted([*table.free_pages, *table.evictable, *held]) == list(range(self.total))
            and table.num_pages == self.total
        )
        assert table.reserved_lens == self.promised and self.owed() <= table.num_available_pages, (
            "a promise cannot be kept"
        )

    def what_is_known_is_there(self) -> None:
        known = self.allocator.prefix_index.pages
        assert known.keys() == self.known.keys()
        for page, tokens in self.known.items():
            start = (len(tokens) - 1) // self.size * self.size
            assert known[page].tokens == tokens[start:]
            for i in range(start, len(tokens)):
                assert self.memory[page * self.size + i % self.size] == tokens[: i + 1], "a known page was changed"
        listed = Counter(page for pages in self.allocator.prefix_index.children.values() for page in pages)
        assert listed == Counter(self.known.keys()), "a page is found under what it does not hold"

    def check(self) -> None:
        self.every_sequence_reads_its_own_tokens()
        self.every_page_is_free_or_idle_or_counted()
        self.what_is_known_is_there()
