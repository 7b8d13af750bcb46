"""Who goes first: the seats of the next batch.

Seats are dealt to the keys in turn; within a key to the earliest deadline, then the earliest arrival. One seat is kept for the
shortest request, so that a 1-NFE request never waits behind a full batch of longer ones for more than one NFE; the others are
dealt whatever the length, so that nobody starves.

An even share is not enough for whoever shares seats with a flood: full batches take several times as long as the small ones
they had before. So a key that floods has seats when nobody else wants any, and beside the others in every TURN-th batch; and
never more than a FEW of them while others have had seats lately, since who comes next waits for the end of the batch.
"""

from collections import Counter
from collections.abc import Set

from server.engine.member import Member

FLOOD = 2  # full batches that a key may have under way before it floods
TURN = 16
FEW = 8  # one seat in so many
LATELY = 50  # batches: about a second


class Seats:
    """Of one kind of work: NFEs or decodes."""

    def __init__(self) -> None:
        self.kept = False
        self.number = 0
        self.served: dict[str, int] = {}  # by key, the number of the last batch in which it had a seat; lately ones alone

    def deal(self, candidates: list[Member], seats: int, flooding: Set[str] = frozenset()) -> list[Member]:
        """The batch. flooding: keys, see `flooding`."""
        self.number += 1
        batch = candidates if len(candidates) == 1 else self.choose(candidates, seats, flooding)
        self.remember(batch)
        return batch

    def choose(self, candidates: list[Member], seats: int, flooding: Set[str]) -> list[Member]:
        """All of the first one's size. Where there is only one seat, it is kept for the shortest every other time."""
        hands = self.hands(candidates)
        others = [(hand, member) for hand, member in hands if member.who not in flooding]
        if others and self.number % TURN:
            hands = others
        hands = [(hand, member) for hand, member in hands if member.shape == hands[0][1].shape]
        lately = self.served.keys() | {member.who for _, member in hands}
        most = max(seats // FEW, 1) if lately - flooding else seats
        batch = [member for hand, member in hands if hand < most or member.who not in flooding][:seats]
        if len(hands) > len(batch):
            shortest = min((member for _, member in hands), key=lambda member: member.length)
            self.kept = shortest not in batch and (seats > 1 or not self.kept)
            if self.kept:
                batch[-1] = shortest
        return batch

    def hands(self, candidates: list[Member]) -> list[tuple[int, Member]]:
        """In turn: the first of each key (hand 0), then the second (hand 1), and so on; the key whose last seat is longest ago
        first."""
        dealt: Counter[str] = Counter()
        hands = []
        for member in sorted(candidates, key=lambda member: member.urgency):
            hands.append((dealt[member.who], member))
            dealt[member.who] += 1
        return sorted(hands, key=lambda one: (one[0], self.served.get(one[1].who, 0), one[1].urgency))

    def remember(self, batch: list[Member]) -> None:
        """Whose turn it was. The server's own questions are nobody's."""
        for member in batch:
            if not member.progress.request.probe:
                self.served[member.who] = self.number
        for who in [who for who, number in self.served.items() if number <= self.number - LATELY]:
            del self.served[who]


def flooding(members: list[Member], seats: int) -> set[str]:
    """The keys that have more than FLOOD full batches under way."""
    if len(members) <= FLOOD * seats:
        return set()
    return {who for who, count in Counter(member.who for member in members).items() if count > FLOOD * seats}
