"""What a proxy tells its manager of traffic and scrapes: differences to what it told before.

Endpoints with traffic lately are told of every second, quiet ones with replicas every five: a rule that
scales down needs a fresh zero, and a fresh zero is cheap. What does not fit in a report comes with the next,
those that have waited longest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dure.appproxy.meter import CLASSES, LATENCY_BOUNDS_S, EndpointMeter
from dure.routing.v1 import routing_pb2 as pb

BUSY_INTERVAL_S = 1.0
QUIET_INTERVAL_S = 5.0
# An endpoint counts as busy this long after its last request.
BUSY_AFTER_S = 60.0
ENDPOINTS_PER_REPORT_MAX = 200
# Well under the 1 MiB that a message may have; a replica's scrape is bounded to a part of it.
BYTES_PER_REPORT_MAX = 512 * 1024
# So that a round over a tick's lateness is not a round left out.
_EARLY_S = 0.1
_BOUNDS_MS = [bound * 1000 for bound in LATENCY_BOUNDS_S]


@dataclass(frozen=True, slots=True)
class Scraped:
    """A scrape of a replica: what it showed, or why it failed, and when."""

    at_s: float
    message: pb.Scrape


@dataclass(frozen=True, slots=True)
class Seen:
    """An endpoint as it is now. `replicas` are its targets, draining or not."""

    meter: EndpointMeter
    replicas: tuple[str, ...]


@dataclass(slots=True)
class _Told:
    """What was told last of an endpoint, and when."""

    at_s: float
    busy_s: float
    arrived: int = 0
    answered: list[int] = field(default_factory=list)
    bytes_in: int = 0
    bytes_out: int = 0
    latency: list[int] = field(default_factory=list)
    first_byte: list[int] = field(default_factory=list)
    replicas: dict[str, int] = field(default_factory=dict)


class Measuring:
    """Makes the measurements of reports. `start` with each stream, `take` until it returns nothing."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}
        # When the scrape that was told last was made, by replica.
        self._scrapes_s: dict[str, float] = {}

    def start(self, endpoints: Mapping[str, Seen], now_s: float) -> None:
        """A new stream: what happened while nobody listened is not what happens now."""
        self._told = {uid: _told(seen.meter, now_s, now_s) for uid, seen in endpoints.items()}
        self._scrapes_s = {}

    def take(
        self, endpoints: Mapping[str, Seen], scrapes: Mapping[str, Scraped], now_s: float
    ) -> list[pb.EndpointMeasurement]:
        """The measurements of one report, each endpoint at most once a second; empty if none is due."""
        for uid in [uid for uid in self._told if uid not in endpoints]:
            del self._told[uid]
        for uid in [uid for uid in self._scrapes_s if uid not in scrapes]:
            del self._scrapes_s[uid]
        found: list[pb.EndpointMeasurement] = []
        left_bytes = BYTES_PER_REPORT_MAX
        for uid in self._due(endpoints, scrapes, now_s)[:ENDPOINTS_PER_REPORT_MAX]:
            new = self._new_scrapes(endpoints[uid], scrapes)
            if found and left_bytes < (scrapes[new[0]].message.ByteSize() if new else 1):
                break
            measurement = self._measure(uid, endpoints[uid], now_s)
            left_bytes -= measurement.ByteSize()
            for replica_uid in new:
                scraped = scrapes[replica_uid]
                left_bytes -= scraped.message.ByteSize()
                if left_bytes < 0:
                    break
                self._scrapes_s[replica_uid] = scraped.at_s
                _add_scrape(measurement, replica_uid, scraped, now_s)
            found.append(measurement)
        return found

    def _due(self, endpoints: Mapping[str, Seen], scrapes: Mapping[str, Scraped], now_s: float) -> list[str]:
        due: list[tuple[float, str]] = []
        for uid, seen in endpoints.items():
            told = self._told.get(uid)
            if told is None:
                # Of a new endpoint there is a span to tell of only from now on.
                self._told[uid] = _told(EndpointMeter("", ""), now_s, now_s)
                continue
            meter = seen.meter
            if meter.in_flight or meter.arrived != told.arrived:
                told.busy_s = now_s
            waited_s = now_s - told.at_s + _EARLY_S
            if waited_s < BUSY_INTERVAL_S:
                continue
            if (
                now_s - told.busy_s < BUSY_AFTER_S
                or (seen.replicas and waited_s >= QUIET_INTERVAL_S)
                or (scrapes and self._new_scrapes(seen, scrapes))
            ):
                due.append((told.at_s, uid))
        due.sort()
        return [uid for _, uid in due]

    def _new_scrapes(self, seen: Seen, scrapes: Mapping[str, Scraped]) -> list[str]:
        """Replicas whose newest scrape has not been told, those first of which was told longest ago."""
        told_s = self._scrapes_s
        new = [
            uid
            for uid in seen.replicas
            if (scraped := scrapes.get(uid)) is not None and scraped.at_s > told_s.get(uid, -1.0)
        ]
        new.sort(key=lambda uid: told_s.get(uid, -1.0))
        return new

    def _measure(self, uid: str, seen: Seen, now_s: float) -> pb.EndpointMeasurement:
        meter, before = seen.meter, self._told[uid]
        after = self._told[uid] = _told(meter, now_s, before.busy_s)
        result = pb.EndpointMeasurement(
            endpoint_uid=uid,
            span_ms=max(1, round((now_s - before.at_s) * 1000)),
            arrived=after.arrived - before.arrived,
            concurrency=meter.in_flight,
            queue=meter.queued + meter.held,
            bytes_in=after.bytes_in - before.bytes_in,
            bytes_out=after.bytes_out - before.bytes_out,
            latency=_less(after.latency, before.latency),
            first_byte=_less(after.first_byte, before.first_byte),
            latency_bounds_ms=_BOUNDS_MS,
        )
        for position, count in enumerate(_less(after.answered, before.answered)):
            if count:
                result.answered[(position + 1) % len(CLASSES)] = count
        for replica_uid in seen.replicas:
            replica = meter.replicas.get(replica_uid)
            if replica is not None:
                answered = after.replicas[replica_uid] - before.replicas.get(replica_uid, 0)
                if answered or replica.in_flight:
                    result.replicas.add(
                        replica_uid=replica_uid, answered=max(0, answered), concurrency=replica.in_flight
                    )
        return result


def _add_scrape(
    measurement: pb.EndpointMeasurement, replica_uid: str, scraped: Scraped, now_s: float
) -> None:
    for replica in measurement.replicas:
        if replica.replica_uid == replica_uid:
            break
    else:
        replica = measurement.replicas.add(replica_uid=replica_uid)
    replica.scrape.CopyFrom(scraped.message)
    replica.scrape.age_ms = max(0, round((now_s - scraped.at_s) * 1000))


def _told(meter: EndpointMeter, now_s: float, busy_s: float) -> _Told:
    return _Told(
        at_s=now_s,
        busy_s=busy_s,
        arrived=meter.arrived,
        answered=_less(meter.requests, meter.denied),
        bytes_in=meter.bytes_in,
        bytes_out=meter.bytes_out,
        latency=list(meter.latency),
        first_byte=list(meter.first_byte),
        replicas={uid: sum(replica.requests) for uid, replica in meter.replicas.items()},
    )


def _less(after: Iterable[int], before: Iterable[int]) -> list[int]:
    return [mine - theirs for mine, theirs in zip(after, before, strict=True)]
