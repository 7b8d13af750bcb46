"""Who goes first: the seats of the next batch.

Seats are dealt to the keys in turn, so that one that floods is no burden to the others; within a key to the earliest deadline,
then the earliest arrival. One seat is kept for the shortest request, so that a 1-NFE request never waits behind a full batch of
longer ones for more than one NFE; the others are dealt whatever the length, so that nobody starves.
"""

import itertools
from collections import Counter, defaultdict

from server.engine.member import Member


class Seats:
    """Of one kind of work: NFEs or decodes."""

    def __init__(self) -> None:
        self.kept = False
        self.batches = itertools.count(1)
        self.served: defaultdict[str, int] = defaultdict(int)  # by key, the last batch in which it had a seat

    def deal(self, candidates: list[Member], seats: int) -> list[Member]:
        """The batch: all of the first one's size. Where there is only one seat, it is kept every other time."""
        candidates = self.in_turn(candidates)
        candidates = [member for member in candidates if member.shape == candidates[0].shape]
        batch = candidates[:seats]
        if len(candidates) > seats:
            shortest = min(candidates, key=lambda member: member.length)
            self.kept = shortest not in batch and (seats > 1 or not self.kept)
            if self.kept:
                batch[-1] = shortest
        self.served |= dict.fromkeys((member.who for member in batch), next(self.batches))
        return batch

    def in_turn(self, candidates: list[Member]) -> list[Member]:
        """One of each key, then another of each, and so on; the key whose last seat is longest ago first."""
        hands: Counter[str] = Counter()
        order = []
        for member in sorted(candidates, key=lambda member: member.urgency):
            order.append((hands[member.who], self.served[member.who], member.urgency, member))
            hands[member.who] += 1
        return [member for *_, member in sorted(order, key=lambda entry: entry[:3])]
