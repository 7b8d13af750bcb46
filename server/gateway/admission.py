"""Who may wait: work is predicted from measured times and taken in only while it can be done in time.

The unit is seconds of the device. A student's cost per NFE and per image is learned from what it has run, each row's share
of its batch; what is admitted and not yet done is the backlog.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from server.gateway.backend import Generated, StudentCard
from server.gateway.errors import ApiError

LEARNING_RATE = 0.1
NOTHING: Mapping[str, int] = {}
UNKNOWN_SECONDS = 0.02  # of an NFE, and of the rest, before the first image of a size


class Wanted(Protocol):
    """What a plan says of the work it asks for. who: the prefix of a key; deadline on the clock of time.monotonic."""

    @property
    def who(self) -> str: ...
    @property
    def student(self) -> StudentCard: ...
    @property
    def size(self) -> str: ...
    @property
    def nfe(self) -> int: ...
    @property
    def deadline(self) -> float: ...


@dataclass
class Cost:
    """Seconds of one student at one size: of an NFE, and of all that comes once per image."""

    nfe: float = UNKNOWN_SECONDS
    image: float = UNKNOWN_SECONDS


@dataclass(eq=False)
class Ticket:
    """Work of one request. Whole nanoseconds, whose sums never drift; deadline on the clock of time.monotonic."""

    who: str
    nanoseconds: int
    deadline: float


class Admission:
    """limit_seconds: predicted work that may wait in all; key_share: the part of it that one key may hold, 0 to 1."""

    def __init__(self, limit_seconds: float, key_share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_seconds, self.key_share, self.clock = limit_seconds, key_share, clock
        self.costs: defaultdict[tuple[str, str], Cost] = defaultdict(Cost)
        self.tickets: set[Ticket] = set()
        self.backlog: Counter[str] = Counter()  # nanoseconds by key, so that a refusal need not look at every ticket
        self.total = 0

    @contextmanager
    def admitted(self, plan: Wanted, images: int, besides: Mapping[str, int] = NOTHING) -> Iterator[None]:
        """Holds room for so many images of a plan. besides: work that waits elsewhere, nanoseconds by key. Raises ApiError 429
        or 503 at once when there is none."""
        if not images:
            yield
            return
        ticket = self.ticket(plan, images)
        self.check(ticket, besides)
        self.take(ticket)
        try:
            yield
        finally:
            self.give_back(ticket)

    def ticket(self, plan: Wanted, images: int) -> Ticket:
        return Ticket(plan.who, round(self.predict(plan, images) * 1e9), plan.deadline)

    def take(self, ticket: Ticket) -> None:
        self.tickets.add(ticket)
        self.backlog[ticket.who] += ticket.nanoseconds
        self.total += ticket.nanoseconds

    def give_back(self, ticket: Ticket) -> None:
        self.tickets.remove(ticket)
        self.backlog[ticket.who] -= ticket.nanoseconds
        self.total -= ticket.nanoseconds
        if not self.backlog[ticket.who]:
            del self.backlog[ticket.who]

    def check_room(self, who: str) -> None:
        """Raises ApiError 429 or 503 when not even the cheapest image would be let in."""
        cheapest = min((cost.nfe + cost.image for cost in self.costs.values()), default=0.0)
        self.check(Ticket(who, round(cheapest * 1e9), math.inf))

    def predict(self, plan: Wanted, images: int) -> float:
        """Seconds of the device."""
        cost = self.costs[plan.student.name, plan.size]
        return images * (plan.nfe * cost.nfe + cost.image)

    def learn(self, plan: Wanted, image: Generated) -> None:
        """Moves the costs towards what an image took, its share of each batch."""
        cost = self.costs[plan.student.name, plan.size]
        shares = [(span.stage, span.nanoseconds / span.batch / 1e9) for span in image.spans]
        steps = [seconds for stage, seconds in shares if stage.startswith("nfe")]
        rest = sum(seconds for stage, seconds in shares if stage in ("vae_decoder", "preview"))
        cost.nfe += LEARNING_RATE * (sum(steps) / len(steps) - cost.nfe)
        cost.image += LEARNING_RATE * (rest - cost.image)

    def check(self, ticket: Ticket, besides: Mapping[str, int] = NOTHING) -> None:
        """Work that is alone is always taken in, however long it is. Raises ApiError."""
        seconds, backlog = ticket.nanoseconds / 1e9, (self.total + sum(besides.values())) / 1e9
        own = (self.backlog[ticket.who] + besides.get(ticket.who, 0)) / 1e9
        share = self.key_share * self.limit_seconds
        if self.key_share < 1 and own and own + seconds > share:
            said = f"this key has {own:.1f} s of work waiting and may have {share:.1f} s"
            raise refusal(429, said, "queue_share", own + seconds - share)
        if backlog and backlog + seconds > self.limit_seconds:
            said = f"the server is full: {backlog:.1f} s of work are waiting"
            raise refusal(503, said, "overloaded", backlog + seconds - self.limit_seconds)
        if self.clock() + backlog + seconds > ticket.deadline:
            self.check_deadline(ticket, seconds)

    def check_deadline(self, ticket: Ticket, seconds: float) -> None:
        """Whether what is due sooner leaves time for a ticket's `seconds`. Raises ApiError."""
        sooner = sum(other.nanoseconds for other in self.tickets if other.deadline <= ticket.deadline) / 1e9
        late = self.clock() + sooner + seconds - ticket.deadline
        if sooner and late > 0:
            raise refusal(503, f"the deadline would be missed by {late * 1000:.0f} ms", "deadline_unreachable", late)


def refusal(status: int, message: str, code: str, seconds: float) -> ApiError:
    """seconds: after so long there is room again, should nothing else come."""
    headers = {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
    return ApiError(status, f"{message}; try again in {seconds:.1f} s", code=code, headers=headers)
