"""Items into bins, where bins run side by side, one for every rank, slot after slot.

Under ZeRO-3 every layer's gather waits for the slowest rank, so a slot lasts as long as its largest bin. What is made
small is the sum over slots of the largest bin's cost; ranks' totals do not matter.

First the number of slots is found: as many as best fit decreasing needs for the tokens. Then two ways are tried. Slots
are filled one after another by best fit, largest items first, up to a level: the mean cost of a bin of what is left, or
the largest item where that is more. What does not fit a slot is left to the next one; the last takes all, at the lowest
level at which it can (MULTIFIT: Coffman, Garey and Johnson 1978). The other is longest-processing-time first (Graham
1969) over the bins of all slots at once. The better one of the two is taken.

Costs are whole numbers and ties go to the lower index, so that every rank comes to the same bins.
"""

import bisect
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

Bin = list[int]  # items
Slot = list[Bin]  # one bin for every rank, in no order

PRECISION = 2048  # the last slot's level is known to one part in so many
LOOKS = 256  # bins without room for an item's tokens that are looked at, so that no step takes minutes


@dataclass(frozen=True)
class Items:
    """What is packed.

    Args:
        costs: of each item, in any unit.
        tokens: of each item; at most `budget`.
        num_ranks: bins of a slot.
        budget: tokens of a bin at most.
    """

    costs: Sequence[int]
    tokens: Sequence[int]
    num_ranks: int
    budget: int

    def level(self, items: Sequence[int], num_bins: int) -> int:
        """No smaller level can do for `items`, the largest first: the mean of the bins, or the largest item."""
        return max(self.costs[items[0]], -(-self.cost(items) // num_bins)) if items else 0

    @cached_property
    def dearest_token(self) -> int:
        """The highest cost of a token of any item."""
        return max((-(-cost // max(count, 1)) for cost, count in zip(self.costs, self.tokens, strict=True)), default=1)

    def cost(self, items: Iterable[int]) -> int:
        """Of some items together."""
        return sum(self.costs[item] for item in items)


def slots_of(costs: Sequence[int], tokens: Sequence[int], num_ranks: int, budget: int) -> list[Slot]:
    """Every item in one bin.

    Args:
        costs: of each item, in any unit.
        tokens: of each item.
        num_ranks: bins of a slot.
        budget: tokens of a bin at most. An item that alone has more gets a bin of its own.

    Returns:
        As few slots as are found to hold the items, at least one; the one with the largest bin, in tokens, first.
    """
    items = Items(costs, [min(count, budget) for count in tokens], num_ranks, budget)
    order = sorted(range(len(costs)), key=lambda item: (-costs[item], item))
    tightest = _by_tokens(items)
    num_slots = max(1, -(-len(tightest) // num_ranks))
    whole = _longest_first(items, order, num_slots)
    ways = [whole, _slot_by_slot(items, order, num_slots, whole)]
    found = [slots for slots in ways if slots is not None] or [_cut(items, tightest)]
    best = min(found, key=lambda slots: span(slots, costs))
    return sorted(best, key=lambda slot: -max(_count(one, tokens) for one in slot))


def span(slots: Sequence[Sequence[Sequence[int]]], costs: Sequence[int]) -> int:
    """Sum over slots of the cost of the slot's largest bin."""
    return sum(max(sum(costs[item] for item in one) for one in slot) for slot in slots)


def by_rank(slots: Sequence[Slot], costs: Sequence[int]) -> list[list[Bin]]:
    """[rank][slot]: the larger bins of a slot go to the ranks that have had less so far, so that sums are even."""
    loads = [0] * len(slots[0])
    ranks: list[list[Bin]] = [[] for _ in loads]
    for slot in slots:
        idle = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
        ordered = sorted(((sum(costs[item] for item in one), one) for one in slot), key=lambda pair: -pair[0])
        for rank, (load, one) in zip(idle, ordered, strict=True):
            ranks[rank].append(one)
            loads[rank] += load
    return ranks


def merged(ranks: Sequence[Sequence[Sequence[int]]], tokens: Sequence[int], budget: int) -> list[list[Bin]] | None:
    """[rank][slot] with whole slots put together as long as every rank's bin keeps the budget.

    None if a bin exceeds it already.
    """
    groups: list[list[int]] = []  # of slots
    sums: list[list[int]] = []  # [group][rank]: tokens
    for slot in range(len(ranks[0])):
        added = [_count(bins[slot], tokens) for bins in ranks]
        if max(added) > budget:
            return None
        for group, held in zip(groups, sums, strict=True):
            if all(old + new <= budget for old, new in zip(held, added, strict=True)):
                group.append(slot)
                held[:] = [old + new for old, new in zip(held, added, strict=True)]
                break
        else:
            groups.append([slot])
            sums.append(added)
    return [[[item for slot in group for item in bins[slot]] for group in groups] for bins in ranks]


def _by_tokens(items: Items) -> list[Bin]:
    """As few bins as best fit decreasing needs, whatever they cost."""
    bins: list[Bin] = []
    room: list[tuple[int, int]] = []  # tokens that a bin can still take, and its index; ascending
    for item in sorted(range(len(items.tokens)), key=lambda item: (-items.tokens[item], item)):
        place = bisect.bisect_left(room, (items.tokens[item], -1))
        if place == len(room):
            bins.append([])
            room.append((items.budget, len(bins) - 1))
        left, index = room.pop(place)
        bins[index].append(item)
        bisect.insort(room, (left - items.tokens[item], index))
    return bins


def _slot_by_slot(items: Items, order: Sequence[int], num_slots: int, whole: list[Slot] | None) -> list[Slot] | None:
    """None if the last slot cannot take what is left.

    Args:
        items: all.
        order: of them, the costliest first.
        num_slots: to be filled.
        whole: what longest-processing-time first came to; one slot that is no better is not looked for.
    """
    slots, left = [], list(order)
    for following in range(num_slots - 1, 0, -1):
        slot, left = _best_fit(items, left, items.level(left, items.num_ranks * (following + 1)))
        slots.append(slot)
    known = whole[0] if num_slots == 1 and whole is not None else None
    last = _last_slot(items, left, known)
    return None if last is None else [*slots, last]


def _last_slot(items: Items, left: Sequence[int], known: Slot | None) -> Slot | None:
    """All that is left, at the lowest level that is found; None if the bins' tokens do not allow for it."""
    low = items.level(left, items.num_ranks)
    if known is None:
        slots = _longest_first(items, left, 1)
        known = slots[0] if slots else None
    found = known
    high = 2 * low if known is None else max(map(items.cost, known))
    step = low // PRECISION
    level = low + step  # which often does, and ends the search
    while level < high:
        slot, rest = _best_fit(items, left, level, whole=True)
        if rest:
            low = level
        else:
            found = slot
            high = max(map(items.cost, slot))
        if high - low <= max(1, step):
            break
        level = (low + high) // 2
    return found


def _best_fit(items: Items, order: Sequence[int], level: int, whole: bool = False) -> tuple[Slot, list[int]]:
    """Each item into the fullest bin that takes it; returns the bins, and the items that no bin takes.

    Args:
        items: all.
        order: those that are packed, the costliest first.
        level: cost of a bin at most.
        whole: all or nothing: stop at the first item that no bin takes.
    """
    costs, tokens, dearest = items.costs, items.tokens, items.dearest_token
    bins: Slot = [[] for _ in range(items.num_ranks)]
    cost_left, tokens_left = [level] * items.num_ranks, [items.budget] * items.num_ranks
    # What a bin can still take at most, ascending. A bin that has less of it than an item costs cannot take the item.
    room = [(min(level, items.budget * dearest), index) for index in range(items.num_ranks)]
    rest = []
    for item in order:
        cost, count = costs[item], tokens[item]
        place = bisect.bisect_left(room, (cost, -1))
        last_look = min(place + LOOKS, len(room))
        while place < last_look and tokens_left[room[place][1]] < count:
            place += 1
        if place == last_look:
            rest.append(item)
            if whole:
                break
            continue
        _, index = room.pop(place)
        bins[index].append(item)
        cost_left[index] -= cost
        tokens_left[index] -= count
        bisect.insort(room, (min(cost_left[index], tokens_left[index] * dearest), index))
    return bins, rest


def _longest_first(items: Items, order: Sequence[int], num_slots: int) -> list[Slot] | None:
    """None if an item is left that no bin's tokens allow for."""
    costs, tokens, budget = items.costs, items.tokens, items.budget
    bins: list[Bin] = [[] for _ in range(items.num_ranks * num_slots)]
    held = [0] * len(bins)
    loads = [(0, index) for index in range(len(bins))]  # a heap: the least loaded bin, the first among equals
    for item in order:
        full = []
        while loads and len(full) < LOOKS and held[loads[0][1]] + tokens[item] > budget:
            full.append(heapq.heappop(loads))
        if not loads or len(full) == LOOKS:
            return None
        load, index = loads[0]
        bins[index].append(item)
        held[index] += tokens[item]
        heapq.heapreplace(loads, (load + costs[item], index))
        for one in full:
            heapq.heappush(loads, one)
    return _cut(items, bins)


def _cut(items: Items, bins: Sequence[Bin]) -> list[Slot]:
    """Bins of like cost side by side; empty ones make the last slot whole."""
    ordered: Iterator[Bin] = iter(sorted(bins, key=lambda one: -items.cost(one)))
    num_slots = max(1, -(-len(bins) // items.num_ranks))
    slots = [list(itertools.islice(ordered, items.num_ranks)) for _ in range(num_slots)]
    slots[-1] += [[] for _ in range(items.num_ranks - len(slots[-1]))]
    return slots


def _count(items: Iterable[int], tokens: Sequence[int]) -> int:
    return sum(tokens[item] for item in items)
