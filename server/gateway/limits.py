"""What one key may do: requests a minute and requests at once, counted exactly and told in RateLimit headers."""

import math
import time
from collections import deque
from collections.abc import Callable

from server.gateway.errors import ApiError
from server.gateway.keys import Key

WINDOW_SECONDS = 60
BUSY_SECONDS = 1.0  # when a place becomes free is not known; most requests take less


class Usage:
    """One key's recent requests. A log of times rather than a token bucket, so that no 60 seconds ever hold more than the
    rate, and the time to wait is exact."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self.clock = clock
        self.times: deque[float] = deque()
        self.running = 0

    def enter(self, key: Key) -> None:
        """Counts a request, which must `leave` in the end; raises ApiError 429, having counted nothing."""
        now = self.clock()
        while self.times and self.times[0] <= now - WINDOW_SECONDS:
            self.times.popleft()
        if key.requests_per_minute and len(self.times) >= key.requests_per_minute:
            said = f"this key has made its {key.requests_per_minute} requests of the last minute"
            raise self.refused(key, said, self.times[-key.requests_per_minute] + WINDOW_SECONDS - now)
        if key.concurrency and self.running >= key.concurrency:
            raise self.refused(key, f"this key has {self.running} requests under way, as many as it may", BUSY_SECONDS)
        if key.requests_per_minute:
            self.times.append(now)
        self.running += 1

    def leave(self) -> None:
        self.running -= 1

    def refused(self, key: Key, message: str, seconds: float) -> ApiError:
        """429, worth another try after `seconds`."""
        waiting = {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
        headers = self.headers(key) | waiting | {"x-should-retry": "true"}
        return ApiError(429, f"{message}; try again in {seconds:.1f} s", code="rate_limit_exceeded", headers=headers)

    def headers(self, key: Key) -> dict[str, str]:
        """RateLimit and RateLimit-Policy as in draft-ietf-httpapi-ratelimit-headers-10; none for a key without bounds."""
        policies, left = [], []
        if rate := key.requests_per_minute:
            policies.append(f'"requests";q={rate};w={WINDOW_SECONDS}')
            oldest = self.times[0] + WINDOW_SECONDS - self.clock() if self.times else 0
            left.append(f'"requests";r={max(0, rate - len(self.times))};t={max(0, math.ceil(oldest))}')
        if key.concurrency:
            policies.append(f'"concurrency";q={key.concurrency};qu="concurrent-requests"')
            left.append(f'"concurrency";r={max(0, key.concurrency - self.running)}')
        return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(left)} if policies else {}
