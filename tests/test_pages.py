"""The page allocator against a model that keeps what every sequence should read as a plain list."""

from collections import Counter
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from vila_triton.pages import OutOfPages, PageTable


class Pages(RuleBasedStateMachine):
    """Tokens are numbers that never repeat; `memory` is what the pages hold, written slot by slot as appends grant."""

    alive = Bundle("alive")

    @initialize(pages=st.integers(0, 12), page_size=st.sampled_from([1, 2, 4]))
    def start(self, pages: int, page_size: int) -> None:
        self.table = PageTable(pages, page_size)
        self.total = pages
        self.expected: dict[int, list[int]] = {}
        self.memory: dict[int, int] = {}
        self.tokens = count()
        self.used_ids: set[int] = set()

    def born(self, seq: int, tokens: list[int]) -> int:
        assert seq not in self.used_ids, "an id was used again"
        self.used_ids.add(seq)
        self.expected[seq] = tokens
        return seq

    @rule(target=alive)
    def alloc(self) -> int:
        return self.born(self.table.alloc(), [])

    @rule(target=alive, parent=alive)
    def fork(self, parent: int) -> int:
        return self.born(self.table.fork(parent), list(self.expected[parent]))

    @rule(seq=consumes(alive))
    def free(self, seq: int) -> None:
        self.table.free(seq)
        del self.expected[seq]
        with pytest.raises(KeyError, match=f"no sequence {seq}"):
            self.table.free(seq)

    @rule(pages=st.integers(0, 3))
    def grow(self, pages: int) -> None:
        self.table.grow(pages)
        self.total += pages

    @rule(seq=alive, data=st.data())
    def truncate(self, seq: int, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(self.expected[seq])))
        self.table.truncate(seq, length)
        del self.expected[seq][length:]

    @rule(seq=alive, wrong=st.sampled_from([-1, 1]))
    def truncate_to_what_is_not_there(self, seq: int, wrong: int) -> None:
        length = -1 if wrong < 0 else len(self.expected[seq]) + 1
        with pytest.raises(ValueError, match=f"sequence {seq} has {len(self.expected[seq])} tokens.*{length}"):
            self.table.truncate(seq, length)

    @rule(seqs=st.lists(alive, min_size=1, max_size=4, unique=True), data=st.data())
    def append(self, seqs: list[int], data: st.DataObject) -> None:
        counts = {seq: data.draw(st.integers(0, 3 * self.table.page_size)) for seq in seqs}
        before = self.snapshot()
        shared = {page for page, n in self.table.references.items() if n > 1}
        needed = self.table.needed(counts)
        free = len(self.table.free_pages)
        assert before == self.snapshot(), "counting changed something"
        if needed > free:
            with pytest.raises(OutOfPages, match=f"^{needed} more pages .* {free} of {self.total} "):
                self.table.append(counts)
            assert before == self.snapshot(), "a refused append changed something"
            return
        grant = self.table.append(counts)
        assert free - len(self.table.free_pages) == needed
        assert len(grant.slots) == len(set(grant.slots)) == sum(counts.values())
        size = self.table.page_size
        for source, target in grant.copies:
            assert target in before[0], "a copy went to a page that was in use"
            self.memory.update({target * size + i: self.memory.get(source * size + i, -1) for i in range(size)})
        slots = iter(grant.slots)
        for seq, n in counts.items():
            for _ in range(n):
                slot, token = next(slots), next(self.tokens)
                still_shared = slot // size in shared and self.table.references[slot // size] > 1
                assert not still_shared, "a shared page was written"
                self.memory[slot] = token
                self.expected[seq].append(token)

    def snapshot(self) -> tuple[list[int], dict[int, int], dict[int, tuple[list[int], int]]]:
        sequences = {seq: (list(s.pages), s.length) for seq, s in self.table.sequences.items()}
        return list(self.table.free_pages), dict(self.table.references), sequences

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        assert self.table.sequences.keys() == self.expected.keys()
        for seq, tokens in self.expected.items():
            pages, size = self.table[seq].pages, self.table.page_size
            assert self.table[seq].length == len(tokens)
            assert len(pages) == -(-len(tokens) // size), "a page is held without need"
            assert [self.memory[pages[i // size] * size + i % size] for i in range(len(tokens))] == tokens

    @invariant()
    def every_page_is_free_or_counted(self) -> None:
        held = Counter(page for s in self.table.sequences.values() for page in s.pages)
        assert held == self.table.references
        assert sorted([*self.table.free_pages, *held]) == list(range(self.total)) and self.table.pages == self.total


Pages.TestCase.settings = settings(stateful_step_count=40, max_examples=max(40, settings().max_examples))
TestPages = Pages.TestCase


def test_an_append_is_for_all_sequences_or_for_none() -> None:
    table = PageTable(3, 4)
    a, b = table.alloc(), table.alloc()
    table.append({a: 4})
    with pytest.raises(OutOfPages, match="3 more pages of 4 tokens are needed, but 2 of 3 are free"):
        table.append({a: 4, b: 5})
    assert (table[a].length, table[b].length, len(table.free_pages)) == (4, 0, 2)


def test_the_last_of_two_writers_keeps_a_shared_page() -> None:
    table = PageTable(2, 4)
    a = table.alloc()
    table.append({a: 2})
    b = table.fork(a)
    grant = table.append({a: 1, b: 1})  # one page is copied, not two: the second writer is then alone
    assert len(grant.copies) == 1 and not table.free_pages


@pytest.mark.parametrize("pages, page_size", [(-1, 4), (4, 0)])
def test_sizes_that_make_no_sense_are_refused(pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match=f"{pages} and {page_size}"):
        PageTable(pages, page_size)


def test_negative_counts_are_refused() -> None:
    table = PageTable(2, 4)
    with pytest.raises(ValueError, match="cannot append -1 tokens"):
        table.append({table.alloc(): -1})
