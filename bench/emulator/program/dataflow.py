"""Which registers blocks need and which they may find unwritten; where the paths from a block meet again."""

from collections.abc import Callable, Iterable

from .ptx import END, Block


def live_at_entry(blocks: list[Block], read_first: list[set[str]], written: list[set[str]]) -> list[set[str]]:
    """The registers whose values a block or one behind it may read.

    read_first   by block, those read before the block writes them, or written for some threads only
    written      by block, those it writes
    """
    live = [set(names) for names in read_first]
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            after = live_at_exit(block, live) - written[block.index]
            if not after <= live[block.index]:
                live[block.index] |= after
                changed = True
    return live


def live_at_exit(block: Block, live: list[set[str]]) -> set[str]:
    """The registers that a block behind this one may read."""
    return set().union(*(live[n] for n in block.successors() if n < len(live)))


def known_at_entry(
    blocks: list[Block], transfer: Callable[[int, set[str]], set[str]], everything: Iterable[str]
) -> list[set[str]]:
    """For each block, all that holds on every path to it. transfer(n, before) is what holds after block n."""
    full = set(everything)
    entry = [set(full) for _ in blocks]
    entry[0] = set()
    return _spread(blocks, entry, transfer, set.__and__)


def possible_at_entry(blocks: list[Block], transfer: Callable[[int, set[str]], set[str]]) -> list[set[str]]:
    """For each block, all that holds on some path to it. transfer(n, before) is what may hold after block n."""
    return _spread(blocks, [set() for _ in blocks], transfer, set.__or__)


def _spread(
    blocks: list[Block], entry: list[set[str]], transfer: Callable[[int, set[str]], set[str]], join: Callable
) -> list[set[str]]:
    work, seen = [0], {0}
    while work:
        n = work.pop()
        leaving = transfer(n, entry[n])
        for successor in blocks[n].successors():
            if successor >= len(blocks):
                continue
            joined = join(entry[successor], leaving)
            if successor not in seen or joined != entry[successor]:
                entry[successor] = joined
                seen.add(successor)
                work.append(successor)
    return entry


def meeting_points(blocks: list[Block]) -> list[int]:
    """For each block the nearest that all paths from it run through, its immediate post-dominator, or END."""
    last = len(blocks)  # stands for the end
    successors = [[n if 0 <= n < last else last for n in block.successors()] or [last] for block in blocks]
    for block in blocks:
        if block.target == END:
            successors[block.index] = [*(n for n in successors[block.index] if n != last), last]
    beyond: list[set[int]] = [set(range(last + 1)) for _ in blocks] + [{last}]
    changed = True
    while changed:
        changed = False
        for n in range(last - 1, -1, -1):
            new = set.intersection(*(beyond[s] for s in successors[n])) | {n}
            if new != beyond[n]:
                beyond[n], changed = new, True
    meeting = []
    for n in range(last):
        candidates = beyond[n] - {n}  # a chain: the nearest has the most beyond it
        nearest = max(candidates, key=lambda c: len(beyond[c]), default=last)
        meeting.append(END if nearest == last else nearest)
    return meeting
