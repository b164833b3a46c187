"""What the proxy counts, per endpoint and replica. See `exhibit` for /metrics, `measuring` for reports."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field

# From a cache's answer to a long generation. Measured values are interpolated within a bucket, so neighbours
# differ by no more than a factor of two up to a second, where autoscaling looks.
LATENCY_BOUNDS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75,
    1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx", "aborted")
ABORTED = 0


def _buckets() -> list[int]:
    return [0] * (len(LATENCY_BOUNDS_S) + 1)


def _classes() -> list[int]:
    return [0] * len(CLASSES)


@dataclass(slots=True)
class ReplicaMeter:
    """Counts of one replica."""

    requests: list[int] = field(default_factory=_classes)
    in_flight: int = 0
    connect_failures: int = 0
    ejections: int = 0


@dataclass(slots=True)
class EndpointMeter:
    """Counts of one endpoint. Histograms have a count for each bound and one for what is over the last.

    `latency` and `first_byte` leave out what the proxy itself refused: a flood of 401 must not look like a
    fast service. `denied` are those of `requests` that ended before they were admitted, `arrived` the
    requests that were.
    """

    project: str
    endpoint: str
    requests: list[int] = field(default_factory=_classes)
    denied: list[int] = field(default_factory=_classes)
    refusals: dict[str, int] = field(default_factory=dict)
    arrived: int = 0
    in_flight: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    retries: int = 0
    queued: int = 0
    held: int = 0
    latency: list[int] = field(default_factory=_buckets)
    latency_sum_s: float = 0.0
    first_byte: list[int] = field(default_factory=_buckets)
    first_byte_sum_s: float = 0.0
    replicas: dict[str, ReplicaMeter] = field(default_factory=dict)

    def replica(self, uid: str) -> ReplicaMeter:
        meter = self.replicas.get(uid)
        if meter is None:
            meter = self.replicas[uid] = ReplicaMeter()
        return meter

    def finished(self, status: int, latency_s: float) -> None:
        """A request ended with `status`, or ABORTED when no whole answer got through.

        How long a tunnel stood says nothing of the service.
        """
        self.requests[class_of(status)] += 1
        if status == 101:
            return
        self.latency[bisect_left(LATENCY_BOUNDS_S, latency_s)] += 1
        self.latency_sum_s += latency_s

    def began(self, first_byte_s: float) -> None:
        """The first byte of an answer came, so long after the request."""
        self.first_byte[bisect_left(LATENCY_BOUNDS_S, first_byte_s)] += 1
        self.first_byte_sum_s += first_byte_s

    def refused(self, status: int, code: str, *, admitted: bool) -> None:
        """The proxy gave the answer itself."""
        self.requests[class_of(status)] += 1
        if not admitted:
            self.denied[class_of(status)] += 1
        self.refusals[code] = self.refusals.get(code, 0) + 1

    def keep_replicas(self, uids: Collection[str]) -> None:
        for uid in [u for u, meter in self.replicas.items() if u not in uids and not meter.in_flight]:
            del self.replicas[uid]


def replica_finished(meter: ReplicaMeter, status: int) -> None:
    meter.requests[class_of(status)] += 1


def class_of(status: int) -> int:
    """Where a status stands in `CLASSES`."""
    return status // 100 - 1 if 100 <= status < 600 else len(CLASSES) - 1
