"""Series of measured values: averages over a window, rates of counters, quantiles of histograms."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# The longest window that a rule may have, and the most values that are kept of one series.
WINDOW_MS_MAX = 3_600_000
VALUES_MAX = 4_000


@dataclass
class Series:
    """Values by time, oldest first; bounded by age and number."""

    keep_ms: int = 60_000
    values: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=VALUES_MAX))

    def add(self, at_ms: int, value: float) -> None:
        """What is no number is left out: it must never be averaged into a decision."""
        if not math.isfinite(value):
            return
        self.values.append((at_ms, value))
        while self.values and self.values[0][0] < at_ms - self.keep_ms:
            self.values.popleft()

    def over(self, now_ms: int, window_ms: int) -> tuple[float, int] | None:
        """Average of the values of the last `window_ms` (0: the newest value), and the age of the newest."""
        if not self.values:
            return None
        newest_ms, newest = self.values[-1]
        if not window_ms:
            return newest, now_ms - newest_ms
        inside = [value for at_ms, value in self.values if at_ms > now_ms - window_ms]
        if not inside:
            return newest, now_ms - newest_ms
        return sum(inside) / len(inside), now_ms - newest_ms


def rate(before: tuple[int, float] | None, after: tuple[int, float]) -> float | None:
    """Increase per second between two looks at a counter, None without one or after a reset."""
    if before is None or after[0] <= before[0] or after[1] < before[1]:
        return None
    increase = (after[1] - before[1]) * 1000 / (after[0] - before[0])
    return increase if math.isfinite(increase) else None


@dataclass(frozen=True)
class Buckets:
    """A histogram: how many values lie up to each upper bound and above the one before it.

    There is one count more than bounds: of values above the last bound.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.counts)

    def plus(self, other: Buckets) -> Buckets:
        """Of two histograms of the same bounds; of others, the one that counts more."""
        if self.bounds != other.bounds:
            return self if self.total >= other.total else other
        counts = tuple(mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True))
        return Buckets(self.bounds, counts)

    def quantile(self, share: float) -> float | None:
        """The value below which `share` of the values lie, interpolated within its bucket."""
        total = self.total
        if total <= 0 or not self.bounds:
            return None
        wanted, seen = share * total, 0.0
        low = 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count > 0 and seen + count >= wanted:
                return low + (bound - low) * max(0.0, wanted - seen) / count
            seen += count
            low = bound
        # Above the last bound nothing more is known.
        return self.bounds[-1]


def between(
    before: tuple[Sequence[float], Sequence[float]] | None, after: tuple[Sequence[float], Sequence[float]]
) -> Buckets | None:
    """What was observed between two looks at a cumulative histogram: bounds (the last infinite), counts.

    None without a first look, after a reset, or when the bounds have changed.
    """
    bounds, counts = after
    if before is None or list(before[0]) != list(bounds) or len(counts) != len(bounds) or not bounds:
        return None
    increases = [new - old for old, new in zip(before[1], counts, strict=True)]
    if any(not math.isfinite(value) or value < 0 for value in increases):
        return None
    single = [value - (increases[index - 1] if index else 0.0) for index, value in enumerate(increases)]
    if any(value < 0 for value in single):
        return None
    finite = tuple(bound for bound in bounds if math.isfinite(bound))
    return Buckets(finite, tuple(single) if len(finite) < len(bounds) else (*single, 0.0))


def average(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
