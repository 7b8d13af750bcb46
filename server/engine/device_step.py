"""NFEs of requests whose latents stay on the device from one NFE to the next.

The scheduler forms a new batch for every NFE, so no request can have a row of the batch of its own. Each has a place in a pool
on the device instead: a place holds its latents, its x0 and what conditions it. An NFE copies the rows of its members from
their places into the graph's inputs and the outcome back, on the device. Over the bus go

    in      noise and conditions before the first NFE; 24 bytes a row, the step's line of the sampler table, before each
    out     latents and x0 after the last NFE, and after those that somebody wants to see

A place is given back when its request lets go of it, however the request ends. There are twice as many places as rows in a
batch; a request that finds none, because the scheduler has begun with many and put them off, takes its latents along to the
host and brings them with it again.

Whether latents are finite is asked when they come to the host. That is soon enough: c0 * latents + c1 * x0 + c2 * x0_prev is
not finite wherever one of the three is not, even if its coefficient is 0, so it is still seen after the last NFE; and no row
reads another.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from server.engine.device_session import Call, DeviceSession
from server.engine.session import Tensors

Array = npt.NDArray[Any]

STEPPED = {"latents": "next_latents", "x0_prev": "x0"}  # what an NFE replaces, by what
CONTROL = ("timestep", "coefficients", "nfe")  # what every NFE is told anew


class Place:
    """Where one request's rows are between two NFEs; nobody else has it while this object lives."""

    def __init__(self, free: list[int]) -> None:
        self.index = free.pop()
        weakref.finalize(self, free.append, self.index)


@dataclass(frozen=True)
class Stepped:
    """One row after an NFE: its place, if it has one, and (latents, x0) [1, ...], if they came to the host."""

    place: Place | None
    host: tuple[Array, Array] | None


class DeviceStep:
    """The session of student_step on a device. `step` by one thread at a time."""

    batch_invariant = False

    def __init__(self, session: DeviceSession) -> None:
        self.session, self.runtime = session, session.runtime
        self.told = [name for name in session.tensors.inputs if name in CONTROL]
        self.kept = [name for name in session.tensors.inputs if name not in CONTROL]
        places = 2 * max(shape[0] for shape in session.calls)
        self.free = list(range(places))
        tensors = [call.tensors for call in session.calls.values()]
        self.row_bytes = {name: max(one[name].row_bytes for one in tensors) for name in self.kept}
        self.pool = {name: self.runtime.allocate(places * size) for name, size in self.row_bytes.items()}

    def run(self, tensors: Tensors) -> list[Array]:
        """See session.Session; nothing stays."""
        return self.session.run(tensors)

    def step(
        self, rows: dict[str, list[Array]], places: Sequence[Place | None], wanted: Sequence[bool], count: int
    ) -> list[Stepped]:
        """One NFE. rows: every input as one array [1, ...] per member; where there is a place, only CONTROL is read from it;
        wanted: whose outcome must come to the host; count: rows of the call, those beyond the members hold anything.

        A call that cannot be launched leaves every place as it was; what CUDA says of a launch later, it says of all to come.
        """
        assert len(rows["latents"]) == len(places) == len(wanted) <= count
        call = self.session.call((count, *rows["latents"][0].shape[1:]))
        for row, place in enumerate(places):
            self.seat(call, row, place, rows)
        for name in self.told:
            self.session.send(call.tensors[name].address, name, np.concatenate(rows[name]))
        call.launch()
        stepped = [self.leave(call, row, place, wanted[row]) for row, place in enumerate(places)]
        self.runtime.wait()
        return stepped

    def seat(self, call: Call, row: int, place: Place | None, rows: dict[str, list[Array]]) -> None:
        """Puts a member into its row of the inputs, from its place or from the host."""
        for name in self.kept:
            tensor = call.tensors[name]
            if place:
                self.runtime.copy(tensor.row(row), self.at(name, place), tensor.row_bytes)
            else:
                self.session.send(tensor.row(row), name, rows[name][row])

    def leave(self, call: Call, row: int, place: Place | None, wanted: bool) -> Stepped:
        """Takes a member out of its row of the outputs: to its place, and to the host if that is wanted or no place is free."""
        kept = place or (Place(self.free) if self.free else None)
        if kept:
            for name in self.kept:
                source = call.tensors[STEPPED.get(name, name)]
                if name in STEPPED or place is None:
                    self.runtime.copy(self.at(name, kept), source.row(row), source.row_bytes)
        if kept and not wanted:
            return Stepped(kept, None)
        return Stepped(kept, (self.fetch_row(call, "next_latents", row), self.fetch_row(call, "x0", row)))

    def at(self, name: str, place: Place) -> int:
        """The address of one of a place's rows."""
        return self.pool[name] + place.index * self.row_bytes[name]

    def fetch_row(self, call: Call, name: str, row: int) -> Array:
        """One row of an output, as [1, ...] on the host."""
        tensor = call.tensors[name]
        array = np.empty((1, *tensor.shape[1:]), tensor.dtype)
        self.runtime.copy_out(array, tensor.row(row))
        return array
