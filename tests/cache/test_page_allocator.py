"""The page allocator and its prefix cache against a model that keeps what every sequence should read as plain lists."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from page_allocator_model import World

from vila_triton.cache.attention_recorder import AttentionRecorder
from vila_triton.cache.page_allocator import OutOfPages, PageAllocator, SlotAllocation
from vila_triton.cache.paged_cache import PagedKVCache

CONFIG: Any = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=1, head_dim=4)

THOROUGH = settings().max_examples >= 300
TOKENS = st.lists(st.integers(0, 1), max_size=10)  # two words: beginnings are often the same


class Pages(RuleBasedStateMachine):
    """The things a `World` can do, in any order."""

    alive = Bundle("alive")

    @initialize(pages=st.integers(0, 12), page_size=st.sampled_from([1, 2, 4]))
    def start(self, pages: int, page_size: int) -> None:
        self.world = World(pages, page_size)

    @rule(target=alive)
    def alloc(self) -> int:
        return self.world.alloc()

    @rule(target=alive, tokens=TOKENS)
    def adopt(self, tokens: list[int]) -> int:
        return self.world.adopt(tokens)

    @rule(target=alive, parent=alive)
    def fork(self, parent: int) -> Any:
        child = self.world.fork(parent)
        return multiple() if child is None else child

    @rule(seqs=st.lists(alive, min_size=1, max_size=3, unique=True), new=st.integers(1, 8), data=st.data())
    def admit(self, seqs: list[int], new: int, data: st.DataObject) -> None:
        self.world.admit({seq: data.draw(TOKENS) for seq in seqs}, new)

    @rule(seq=alive)
    def release(self, seq: int) -> None:
        self.world.release(seq)

    @rule(seq=consumes(alive))
    def free(self, seq: int) -> None:
        self.world.free(seq)

    @rule(pages=st.integers(0, 3))
    def grow(self, pages: int) -> None:
        self.world.grow(pages)

    @rule(seq=alive, data=st.data())
    def truncate(self, seq: int, data: st.DataObject) -> None:
        self.world.truncate(seq, data.draw(st.integers(0, len(self.world.expected[seq]))))

    @rule(seq=alive, wrong=st.sampled_from([-1, 1]))
    def truncate_to_what_is_not_there(self, seq: int, wrong: int) -> None:
        self.world.truncate_wrongly(seq, -1 if wrong < 0 else len(self.world.expected[seq]) + 1)

    @rule(seq=alive, data=st.data())
    def publish(self, seq: int, data: st.DataObject) -> None:
        self.world.publish(seq, data.draw(st.integers(0, len(self.world.expected[seq]))))

    @rule(seq=alive, at=st.integers(0, 9))
    def publish_a_lie(self, seq: int, at: int) -> None:
        self.world.publish_a_lie(seq, at)

    @rule(seqs=st.lists(alive, min_size=1, max_size=4, unique=True), data=st.data())
    def append(self, seqs: list[int], data: st.DataObject) -> None:
        self.world.append({seq: data.draw(TOKENS) for seq in seqs})

    @rule(seq=alive, token=st.integers(0, 1), stays=st.booleans())
    def run_ahead(self, seq: int, token: int, stays: bool) -> None:
        self.world.run_ahead(seq, token, stays)

    @invariant()
    def all_is_as_the_model_has_it(self) -> None:
        self.world.check()


Pages.TestCase.settings = settings(stateful_step_count=40, max_examples=max(40, settings().max_examples))
TestPages = Pages.TestCase


@pytest.mark.parametrize("page_size, steps", [(1, 400_000), (4, 400_000), (16, 190_000), (256, 20_000)])
def test_random_operations_agree_with_the_model(page_size: int, steps: int) -> None:
    """All pages are in use most of the time. A million operations under HYPOTHESIS_PROFILE=thorough."""
    rng = random.Random(page_size)
    world = World(12, page_size)
    served = evicted = refused = kept = 0
    for step in range(steps if THOROUGH else min(2_000, steps // 16)):
        alive = list(world.expected)
        seq = rng.choice(alive) if alive else world.alloc()
        length = len(world.expected[seq])
        some = [rng.randint(0, 1) for _ in range(rng.randint(0, 3 * page_size))]
        what = rng.randrange(14)
        if what < 4:
            known, more = len(world.known), {one: some for one in rng.sample(alive, min(len(alive), 2))}
            world.append(more)
            evicted += len(world.known) < known
            refused += any(len(world.expected[one]) == length and some for one in more)
        elif what < 6:
            world.publish(seq, rng.randint(0, length))
        elif what < 8:
            template = rng.choice(list(world.known.values()) or [()])
            served += len(world.expected[world.adopt([*template[: rng.randint(0, 3 * page_size)], *some])]) > 0
        elif what == 8:
            world.truncate(seq, rng.randint(0, length))
        elif what == 9:
            world.fork(seq)
        elif what == 12:
            world.admit({one: some for one in rng.sample(alive, min(len(alive), 2))}, rng.randint(1, 2 * page_size))
            kept += len(world.promised) > 1
        elif what == 13:
            world.release(seq)
        elif what == 10:
            world.publish_a_lie(seq, rng.randint(0, 2 * page_size))
        if what == 11 or len(world.expected) > 6:
            world.free(seq)
        if step % 10 == 0:
            world.check()
    assert min(served, evicted, refused, kept) > 20, "the walk does not go everywhere"


def test_append_allocates_for_all_sequences_or_none() -> None:
    table = PageAllocator(3, 4)
    a, b = table.add_sequence(), table.add_sequence()
    table.append({a: 4})
    with pytest.raises(OutOfPages, match="3 more pages of 4 tokens are needed, but 2 of 3 are free"):
        table.append({a: 4, b: 5})
    assert (table[a].length, table[b].length, len(table.free_pages)) == (4, 0, 2)


def test_fork_without_unreserved_pages_is_refused_and_changes_nothing() -> None:
    cache = PagedKVCache(CONFIG, 2, page_size=4)
    seq = cache.allocator.add_sequence()
    assert not cache.allocator.admit({seq: [1, 2, 3, 4, 5]}, 3)
    cache.allocator.append({seq: 5})
    assert cache.allocator.num_pages_missing({seq: 3}) == 0 == cache.allocator.num_available_pages
    with pytest.raises(OutOfPages, match="sequence 0 cannot be forked: all 0 free pages are reserved"):  # noqa: SIM117
        with cache.roll_back([2], in_place=False):
            raise AssertionError
    assert (
        list(cache.allocator.sequences) == [seq]
        and cache.length(seq) == 5
        and cache.allocator.reserved_lens == {seq: 8}
    )


def test_interrupted_page_copy_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedKVCache(CONFIG, 4, page_size=4)
    first = cache.allocator.add_sequence()
    cache.allocator.append({first: 2})
    for i, x in enumerate(cache.tensors):
        x.fill_(i + 1)
    second, whole = cache.allocator.fork(first), PagedKVCache._copy_pages
    cut = iter([KeyboardInterrupt])

    def copy(self: PagedKVCache, copies: Any) -> None:
        if error := next(cut, None):
            raise error
        whole(self, copies)

    monkeypatch.setattr(PagedKVCache, "_copy_pages", copy)
    cache.tensors[0][:, 1:] = cache.tensors[1][:, 1:] = 0
    with pytest.raises(KeyboardInterrupt), cache.append_step({second: 1}):
        pass
    (page,) = cache.allocator[second].pages
    assert page != cache.allocator[first].pages[0] and cache.length(second) == 2
    assert all((x[:, page] == i + 1).all() for i, x in enumerate(cache.tensors))


def test_last_of_two_writers_keeps_a_shared_page() -> None:
    table = PageAllocator(2, 4)
    a = table.add_sequence()
    table.append({a: 2})
    b = table.fork(a)
    grant = table.append({a: 1, b: 1})  # one page is copied, not two: the second writer is then alone
    assert len(grant.copies) == 1 and not table.free_pages


@pytest.mark.parametrize("pages, page_size", [(-1, 4), (4, 0)])
def test_allocator_invalid_sizes_are_refused(pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match=f"{pages} and {page_size}"):
        PageAllocator(pages, page_size)


def test_append_negative_counts_are_refused() -> None:
    table = PageAllocator(2, 4)
    with pytest.raises(ValueError, match="cannot append -1 tokens"):
        table.append({table.add_sequence(): -1})


def filled(table: PageAllocator, tokens: list[int]) -> int:
    """A sequence in which these tokens are cached, and known to be."""
    seq = table.add_sequence()
    table.append({seq: len(tokens) - table.reuse_prefix(seq, tokens)})
    table.register_prefix(seq, tokens)
    return seq


def test_least_recently_used_page_is_evicted_first_tail_before_head() -> None:
    table = PageAllocator(6, 2)
    old, new = filled(table, [1, 2, 3, 4]), filled(table, [5, 6, 7, 8])
    table.free_sequence(old)
    table.free_sequence(new)
    table.free_sequence(filled(table, [1, 2, 3, 4]))  # the old one is asked for again: now the new one is older
    for left, (a, b) in enumerate([(4, 2), (4, 0), (2, 0), (0, 0)], 1):
        table.append({table.add_sequence(): 4 if left == 1 else 2})  # two pages were free; then one more goes each time
        if left == 1:
            table.append({table.add_sequence(): 2})
        found = table.prefix_index.match([1, 2, 3, 4])[1], table.prefix_index.match([5, 6, 7, 8])[1]
        assert found == (a, b)


def test_diverging_sequences_share_their_prefix_to_the_token() -> None:
    table = PageAllocator(4, 4)
    first = filled(table, [1, 2, 3, 4, 5, 6])
    second = table.add_sequence()
    assert table.reuse_prefix(second, [1, 2, 3, 4, 5, 7, 7]) == 5
    grant = table.append({second: 2})
    assert grant.copies == [(table[first].pages[1], table[second].pages[1])]  # the page in which they part
    assert table[first].pages[0] == table[second].pages[0] and grant.slots == [9, 10]


def test_page_matches_only_behind_the_same_prefix() -> None:
    table = PageAllocator(8, 2)
    filled(table, [1, 2, 3, 4])
    filled(table, [5, 6, 3, 4, 7])
    assert table.prefix_index.match([3, 4]) == ([], 0)
    assert table.prefix_index.match([1, 2, 3, 4, 7])[1] == 4 and table.prefix_index.match([5, 6, 3, 4, 7])[1] == 5


def test_a_fork_does_not_share_the_page_of_a_token_that_does_not_count_yet() -> None:
    table = PageAllocator(4, 4)
    seq = filled(table, [1, 2, 3, 4])
    slots = table.append({seq: 1}).slots
    table.unsettle(seq)
    fork = table.fork(seq)
    assert table.append({fork: 1}).slots != slots and table[seq].pages[0] == table[fork].pages[0]
    table.settle(seq)
    assert table.ref_counts == {
        page: 1 + (page == table[seq].pages[0]) for page in {*table[seq].pages, *table[fork].pages}
    }


@pytest.mark.parametrize("rows", [[0, 7], [-1], [1]])
def test_reorder_unknown_row_is_refused_and_forks_nothing(rows: list[int]) -> None:
    table = PageAllocator(4, 4)
    filled(table, [1, 2, 3])
    with pytest.raises(ValueError, match="there are 1 sequences, and no row"):
        table.reorder(rows)
    assert list(table.sequences) == [0] and table.ref_counts.total() == 1


def test_append_behind_all_registered_tokens_of_a_page_copies_nothing() -> None:
    table = PageAllocator(4, 4)
    seq = filled(table, [1, 2, 3])
    assert table.append({seq: 1}) == SlotAllocation([table[seq].pages[0] * 4 + 3], [])
    assert table.prefix_index.match([1, 2, 3]) == ([table[seq].pages[0]], 3)  # and all of them stay registered


def test_page_is_not_registered_behind_another_prefix() -> None:
    index = PageAllocator(4, 2).prefix_index
    index.insert([0, 1], [1, 2, 3, 4])
    for pages, tokens in (([2, 1], [5, 6, 3, 4]), ([0, 1], [1, 2, 3, 5]), ([1], [3, 4])):
        with pytest.raises(ValueError, match=r"page [01] is registered with other tokens than these 2"):
            index.insert(pages, tokens)
        assert 2 not in index.pages


def test_page_that_holds_none_of_the_tokens_is_not_registered() -> None:
    index = PageAllocator(4, 2).prefix_index
    for tokens in ([1, 2], [1, 2]):
        index.insert([3, 1], tokens)
        assert list(index.pages) == [3] and index.match([1, 2, 3]) == ([3], 2)


def test_attention_weights_are_not_recorded_if_a_part_of_one_sequence_is_cached() -> None:
    cache = PagedKVCache(CONFIG, 4)
    new, old = (cache.allocator.add_sequence() for _ in range(2))
    with cache.append_step({new: 2, old: 3}) as step:
        AttentionRecorder(step, [])
    cache.allocator.truncate(new, 0)
    with cache.append_step({new: 2, old: 1}) as step, pytest.raises(ValueError, match="of whole sequences, but a part"):
        AttentionRecorder(step, [])
