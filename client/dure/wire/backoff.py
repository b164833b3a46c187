"""How long to wait before the next try."""

from __future__ import annotations


def backoff_s(attempt: int, *, first_s: float, max_s: float, jitter: float) -> float:
    """Doubles from `first_s` (attempt 1) up to `max_s`; `jitter` in [0, 1) takes off up to half.

    A fleet that lost its manager at one moment must not come back at one moment.
    """
    full = min(max_s, first_s * 2.0 ** min(max(attempt, 1) - 1, 30))
    return full * (1 - jitter / 2)
