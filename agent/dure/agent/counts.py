"""What the agent counts of its own work, for /metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from dure.wire.prometheus import Counter, Histogram


@dataclass
class Counts:
    """Since the agent's start. `ends` are by the words of `KernelExit`; `started` is the time from taking a
    kernel up to its command running."""

    probes: Counter = field(default_factory=lambda: Counter(("outcome",)))
    ends: Counter = field(default_factory=lambda: Counter(("reason",)))
    started: Histogram = field(default_factory=Histogram)
    measured: Histogram = field(default_factory=Histogram)
