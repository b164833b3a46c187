"""The proxy's /metrics: Prometheus text, version 0.0.4, in pieces.

Labels are bounded: endpoints and replicas that left the table are gone, and of more endpoints than
`ENDPOINTS_MAX` the rest are summed up as `other`, without replicas. A piece is a whole metric of one
endpoint, so that whoever does something else between two pieces never cuts a histogram in two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from dure.appproxy.meter import CLASSES, LATENCY_BOUNDS_S, EndpointMeter

ENDPOINTS_MAX = 1_000
OTHER = "other"
_BOUNDS = (*(f"{bound:g}" for bound in LATENCY_BOUNDS_S), "+Inf")

Labelled = Sequence[tuple[str, EndpointMeter]]


def render(
    endpoints: Mapping[str, EndpointMeter], counters: Mapping[str, float], gauges: Mapping[str, float]
) -> Iterator[str]:
    """Pieces of text, each of whole lines. `counters` and `gauges` are the proxy's own, by full name."""
    labelled = _labelled(endpoints)
    yield from _by_endpoint(
        labelled,
        "dure_proxy_requests_total",
        "counter",
        "Requests by class of the answer's status",
        _requests,
    )
    yield from _by_endpoint(
        labelled, "dure_proxy_refusals_total", "counter", "Answers of the proxy itself, by code", _refusals
    )
    for name, kind, text, attribute in (
        ("dure_proxy_arrived_requests_total", "counter", "Requests that were let in", "arrived"),
        (
            "dure_proxy_in_flight_requests",
            "gauge",
            "Requests under way, those that wait included",
            "in_flight",
        ),
        ("dure_proxy_queued_requests", "gauge", "Requests that wait for a free replica", "queued"),
        ("dure_proxy_held_requests", "gauge", "Requests that wait for an endpoint at zero to start", "held"),
        ("dure_proxy_retries_total", "counter", "Tries after the first", "retries"),
        ("dure_proxy_received_bytes_total", "counter", "Bytes of request bodies", "bytes_in"),
        ("dure_proxy_sent_bytes_total", "counter", "Bytes of response bodies", "bytes_out"),
    ):
        yield from _by_endpoint(labelled, name, kind, text, _plain(attribute))
    yield from _by_endpoint(
        labelled,
        "dure_proxy_request_duration_seconds",
        "histogram",
        "From the request's head to the end of a replica's answer",
        lambda name, labels, m: _histogram(name, labels, m.latency, m.latency_sum_s),
    )
    yield from _by_endpoint(
        labelled,
        "dure_proxy_first_byte_seconds",
        "histogram",
        "From the request's head to the first byte of a replica's answer",
        lambda name, labels, m: _histogram(name, labels, m.first_byte, m.first_byte_sum_s),
    )
    yield from _by_endpoint(
        labelled,
        "dure_proxy_replica_requests_total",
        "counter",
        "Answers of replicas by class of status",
        _replica_requests,
    )
    for name, kind, text, attribute in (
        ("dure_proxy_replica_in_flight_requests", "gauge", "Requests under way at a replica", "in_flight"),
        ("dure_proxy_replica_connect_failures_total", "counter", "Refused connections", "connect_failures"),
        ("dure_proxy_replica_ejections_total", "counter", "Times that a replica was left out", "ejections"),
    ):
        yield from _by_endpoint(labelled, name, kind, text, _replica_plain(attribute))
    for kind, values in (("counter", counters), ("gauge", gauges)):
        for name, value in values.items():
            yield f"# TYPE {name} {kind}\n{name} {_number(value)}\n"


def _labelled(endpoints: Mapping[str, EndpointMeter]) -> Labelled:
    every = list(endpoints.items())
    # Those that had requests first: which of the rest are shown one by one matters to nobody.
    if len(every) > ENDPOINTS_MAX:
        every.sort(key=lambda item: -item[1].arrived)
    shown = [
        (f'project="{_escape(m.project)}",endpoint="{_escape(m.endpoint)}",endpoint_uid="{_escape(uid)}"', m)
        for uid, m in every[:ENDPOINTS_MAX]
    ]
    rest = [meter for _, meter in every[ENDPOINTS_MAX:]]
    if rest:
        shown.append((f'project="{OTHER}",endpoint="{OTHER}",endpoint_uid="{OTHER}"', _sum(rest)))
    return shown


def _sum(meters: Sequence[EndpointMeter]) -> EndpointMeter:
    total = EndpointMeter(OTHER, OTHER)
    for meter in meters:
        for name in ("requests", "denied", "latency", "first_byte"):
            mine, theirs = getattr(total, name), getattr(meter, name)
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]
        for code, count in meter.refusals.items():
            total.refusals[code] = total.refusals.get(code, 0) + count
        for name in (
            "arrived", "in_flight", "bytes_in", "bytes_out", "retries", "queued", "held",
            "latency_sum_s", "first_byte_sum_s",
        ):  # fmt: skip
            setattr(total, name, getattr(total, name) + getattr(meter, name))
    return total


Lines = Callable[[str, str, EndpointMeter], list[str]]


def _by_endpoint(labelled: Labelled, name: str, kind: str, text: str, lines: Lines) -> Iterator[str]:
    yield f"# HELP {name} {text}.\n# TYPE {name} {kind}\n"
    for labels, meter in labelled:
        found = lines(name, labels, meter)
        if found:
            yield "\n".join(found) + "\n"


def _requests(name: str, labels: str, meter: EndpointMeter) -> list[str]:
    return [
        f'{name}{{{labels},class="{kind}"}} {count}'
        for kind, count in zip(CLASSES, meter.requests, strict=True)
    ]


def _refusals(name: str, labels: str, meter: EndpointMeter) -> list[str]:
    return [f'{name}{{{labels},code="{code}"}} {count}' for code, count in meter.refusals.items()]


def _plain(attribute: str) -> Lines:
    return lambda name, labels, meter: [f"{name}{{{labels}}} {getattr(meter, attribute)}"]


def _histogram(name: str, labels: str, counts: Sequence[int], sum_s: float) -> list[str]:
    lines, total = [], 0
    for bound, count in zip(_BOUNDS, counts, strict=True):
        total += count
        lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
    return [*lines, f"{name}_sum{{{labels}}} {sum_s:.6f}", f"{name}_count{{{labels}}} {total}"]


def _replica_requests(name: str, labels: str, meter: EndpointMeter) -> list[str]:
    return [
        f'{name}{{{labels},replica_uid="{_escape(uid)}",class="{kind}"}} {count}'
        for uid, replica in meter.replicas.items()
        for kind, count in zip(CLASSES, replica.requests, strict=True)
        if count
    ]


def _replica_plain(attribute: str) -> Lines:
    return lambda name, labels, meter: [
        f'{name}{{{labels},replica_uid="{_escape(uid)}"}} {getattr(replica, attribute)}'
        for uid, replica in meter.replicas.items()
    ]


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.6f}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
