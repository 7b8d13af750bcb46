"""Resident memory as Linux counts it, and the most of it that was seen."""

import asyncio
import os
import subprocess
import sys

import numpy as np

from server.gateway.resident import MEGABYTE, resident, watched


def test_memory_that_is_touched_is_seen_and_stays_the_peak_when_it_is_given_back() -> None:
    async def scenario() -> tuple[float, float]:
        async with watched(lambda: [os.getpid()]) as peak:
            before = resident([os.getpid()]) / MEGABYTE
            block = np.ones(100 * MEGABYTE, np.uint8)
            peak.look()
            del block
        return before, peak.megabytes

    before, megabytes = asyncio.run(scenario())
    assert before + 90 < megabytes < before + 200


def test_several_processes_are_added_up_and_those_that_ended_have_none() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        own, both = resident([os.getpid()]), resident([os.getpid(), child.pid])
        assert both > own
    finally:
        child.communicate(b"\n")
    assert resident([child.pid]) == 0
    assert resident([]) == 0
