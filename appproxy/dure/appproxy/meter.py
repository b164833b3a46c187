"""What the proxy counts, per endpoint and replica, and its Prometheus text.

Labels are bounded: an endpoint or replica that left the table is dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

LATENCY_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx", "aborted")
ABORTED = 0


@dataclass(slots=True)
class ReplicaMeter:
    """Counts of one replica."""

    requests: list[int] = field(default_factory=lambda: [0] * len(_CLASSES))
    in_flight: int = 0
    connect_failures: int = 0


@dataclass(slots=True)
class EndpointMeter:
    """Counts of one endpoint. `latency` has a count for each bound and one for what is over the last."""

    project: str
    endpoint: str
    requests: list[int] = field(default_factory=lambda: [0] * len(_CLASSES))
    refusals: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    retries: int = 0
    queued: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    latency_sum_s: float = 0.0
    replicas: dict[str, ReplicaMeter] = field(default_factory=dict)

    def replica(self, uid: str) -> ReplicaMeter:
        meter = self.replicas.get(uid)
        if meter is None:
            meter = self.replicas[uid] = ReplicaMeter()
        return meter

    def finished(self, status: int, latency_s: float) -> None:
        """A request ended with `status`, or ABORTED when no whole answer got through."""
        self.requests[_class_of(status)] += 1
        self.latency[bisect_left(LATENCY_BOUNDS_S, latency_s)] += 1
        self.latency_sum_s += latency_s

    def refused(self, code: str) -> None:
        self.refusals[code] = self.refusals.get(code, 0) + 1

    def keep_replicas(self, uids: Collection[str]) -> None:
        for uid in [u for u, meter in self.replicas.items() if u not in uids and not meter.in_flight]:
            del self.replicas[uid]


def replica_finished(meter: ReplicaMeter, status: int) -> None:
    meter.requests[_class_of(status)] += 1


def render(endpoints: Mapping[str, EndpointMeter], unmatched: int, gauges: Mapping[str, float]) -> str:
    """Prometheus text, version 0.0.4. `gauges` are the proxy's own, by full name."""
    return "\n".join(_lines(endpoints, unmatched, gauges)) + "\n"


def _class_of(status: int) -> int:
    return status // 100 - 1 if 100 <= status < 600 else len(_CLASSES) - 1


def _lines(
    endpoints: Mapping[str, EndpointMeter], unmatched: int, gauges: Mapping[str, float]
) -> Iterator[str]:
    labelled = [
        (f'project="{_escape(m.project)}",endpoint="{_escape(m.endpoint)}",endpoint_uid="{_escape(uid)}"', m)
        for uid, m in endpoints.items()
    ]
    yield from _head("dure_proxy_requests_total", "counter", "Requests by class of the answer's status")
    for labels, m in labelled:
        for name, count in zip(_CLASSES, m.requests, strict=True):
            yield f'dure_proxy_requests_total{{{labels},class="{name}"}} {count}'
    yield from _head("dure_proxy_refusals_total", "counter", "Answers of the proxy itself, by code")
    for labels, m in labelled:
        for code, count in m.refusals.items():
            yield f'dure_proxy_refusals_total{{{labels},code="{code}"}} {count}'
    for name, kind, text, attribute in (
        ("dure_proxy_in_flight_requests", "gauge", "Requests under way", "in_flight"),
        ("dure_proxy_queued_requests", "gauge", "Requests that wait for a free replica", "queued"),
        ("dure_proxy_retries_total", "counter", "Tries after the first", "retries"),
        ("dure_proxy_received_bytes_total", "counter", "Bytes of request bodies", "bytes_in"),
        ("dure_proxy_sent_bytes_total", "counter", "Bytes of response bodies", "bytes_out"),
    ):
        yield from _head(name, kind, text)
        for labels, m in labelled:
            yield f"{name}{{{labels}}} {getattr(m, attribute)}"
    name = "dure_proxy_request_duration_seconds"
    yield from _head(name, "histogram", "From the request's head to the end of the answer")
    for labels, m in labelled:
        total = 0
        for bound, count in zip((*LATENCY_BOUNDS_S, "+Inf"), m.latency, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {m.latency_sum_s:.6f}"
        yield f"{name}_count{{{labels}}} {total}"
    yield from _head("dure_proxy_replica_requests_total", "counter", "Answers of replicas by class of status")
    for labels, m in labelled:
        for uid, replica in m.replicas.items():
            for class_name, count in zip(_CLASSES, replica.requests, strict=True):
                if count:
                    yield (
                        f'dure_proxy_replica_requests_total{{{labels},replica_uid="{_escape(uid)}",'
                        f'class="{class_name}"}} {count}'
                    )
    for name, kind, text, attribute in (
        ("dure_proxy_replica_in_flight_requests", "gauge", "Requests under way at a replica", "in_flight"),
        ("dure_proxy_replica_connect_failures_total", "counter", "Refused connections", "connect_failures"),
    ):
        yield from _head(name, kind, text)
        for labels, m in labelled:
            for uid, replica in m.replicas.items():
                yield f'{name}{{{labels},replica_uid="{_escape(uid)}"}} {getattr(replica, attribute)}'
    yield from _head("dure_proxy_unmatched_requests_total", "counter", "Requests to no endpoint's address")
    yield f"dure_proxy_unmatched_requests_total {unmatched}"
    for name, value in gauges.items():
        yield f"# TYPE {name} gauge"
        yield f"{name} {value:g}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}."
    yield f"# TYPE {name} {kind}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
