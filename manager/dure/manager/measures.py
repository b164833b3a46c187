"""What is measured now: in memory, never in the store.

Agents tell what kernels use, proxies what they see of the traffic and what they scrape. Here it becomes one
value per endpoint and metric: the average over its kernels or healthy replicas. Series are kept only
for metrics that a rule names, as long as the rule's window; everything else is its newest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from dure.fleet.v1 import fleet_pb2
from dure.routing.v1 import routing_pb2
from dure.scaling.series import Buckets, Series, between, rate
from dure.scaling.values import Sample, Source

# Values older than this are forgotten, and with them who stopped to report.
FORGET_MS = 60_000
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
PROXY_METRICS = (
    "requests_per_second", "concurrency", "queue",
    "latency:p50", "latency:p95", "latency:p99", "first_byte:p50", "first_byte:p95", "first_byte:p99",
)  # fmt: skip
KERNEL_METRICS = (
    "cpu_util", "cpu_used", "mem", "mem_util", "net_rx", "net_tx", "disk_read", "disk_write",
    "cuda_util", "cuda_mem", "cuda_mem_util",
)  # fmt: skip
# Three times the interval at which each source is measured where a rule names it; proxies repeat themselves
# every 5 s where there is no traffic.
STALE_MS = {Source.PROXY: 15_000, Source.INFERENCE_FRAMEWORK: 3_000, Source.KERNEL: 3_000}

Key = tuple[Source, str, int]


@dataclass
class Traffic:
    """What one proxy saw lately of an endpoint."""

    at_ms: int
    rps: float
    concurrency: float
    queue: float
    errors_per_second: float
    latency: Buckets
    first_byte: Buckets


@dataclass
class _Look:
    """What a replica's metrics page showed once, as it stood."""

    at_ms: int
    gauges: Mapping[str, float]
    counters: Mapping[str, float]
    histograms: Mapping[str, routing_pb2.Histogram]


@dataclass
class _Replica:
    """The newest two looks at a replica's metrics page: rates need both. Worked out when somebody asks."""

    newest: _Look | None = None
    before: _Look | None = None
    error: str = ""

    def value(self, name: str) -> float | None:
        """A gauge, or the rate of a counter."""
        if self.newest is None:
            return None
        if name in self.newest.gauges:
            value = self.newest.gauges[name]
            return value if math.isfinite(value) else None
        if name not in self.newest.counters:
            # Counters are known by their family's name, too.
            name = f"{name}_total"
        if self.before is None or name not in self.newest.counters or name not in self.before.counters:
            return None
        first = (self.before.at_ms, self.before.counters[name])
        return rate(first, (self.newest.at_ms, self.newest.counters[name]))

    def observed(self, name: str) -> Buckets | None:
        """What a histogram observed between the two looks."""
        if self.newest is None or self.before is None or name not in self.newest.histograms:
            return None
        old, new = self.before.histograms.get(name), self.newest.histograms[name]
        first = (old.bounds, old.counts) if old is not None else None
        return between(first, (new.bounds, new.counts))

    def names(self) -> set[str]:
        """Of everything that a rule could name."""
        if self.newest is None:
            return set()
        quantiles = {f"{name}:{q}" for name in self.newest.histograms for q in QUANTILES}
        return {*self.newest.gauges, *self.newest.counters, *quantiles}


@dataclass
class _Endpoint:
    traffic: dict[str, Traffic] = field(default_factory=dict)
    replicas: dict[str, _Replica] = field(default_factory=dict)
    kernels: dict[str, tuple[int, dict[str, float]]] = field(default_factory=dict)
    series: dict[tuple[Source, str], Series] = field(default_factory=dict)
    # What there is of it now, as the controller last saw it.
    healthy: frozenset[str] = frozenset()
    running: frozenset[str] = frozenset()
    active_ms: int = 0
    held_ms: int = 0
    # Since when there is a replica that takes traffic.
    serving_ms: int = 0


class Measures:
    """All that is measured. `changed` is called with the uid of an endpoint that has something new."""

    def __init__(self, clock_ms: Callable[[], int], changed: Callable[[str], None]) -> None:
        self._clock_ms = clock_ms
        self._changed = changed
        self._endpoints: dict[str, _Endpoint] = {}
        self._endpoint_of: dict[str, str] = {}
        # Metrics of an endpoint that rules name, with the windows that they are wanted over.
        self._wanted: dict[str, dict[tuple[Source, str], set[int]]] = {}

    def want(self, endpoint_uid: str, keys: Iterable[Key]) -> None:
        """Keeps series of these metrics for an endpoint, and of no others."""
        metrics: dict[tuple[Source, str], set[int]] = {}
        for source, name, window_ms in keys:
            metrics.setdefault((source, name), set()).add(window_ms)
        if metrics:
            self._wanted[endpoint_uid] = metrics
        else:
            self._wanted.pop(endpoint_uid, None)
        entry = self._endpoints.get(endpoint_uid)
        if entry is not None:
            entry.series = {key: series for key, series in entry.series.items() if key in metrics}

    def compose(self, endpoint_uid: str, healthy: Iterable[str], running: Iterable[str]) -> None:
        """What there is of an endpoint: replicas that take traffic, kernels that run."""
        entry = self._entry(endpoint_uid)
        served = bool(entry.healthy)
        entry.healthy, before, entry.running = frozenset(healthy), entry.running, frozenset(running)
        if entry.healthy and not served:
            entry.serving_ms = self._clock_ms()
        for uid in before - entry.running:
            self._endpoint_of.pop(uid, None)
            entry.kernels.pop(uid, None)
        for uid in entry.running - before:
            self._endpoint_of[uid] = endpoint_uid
        for uid in entry.replicas.keys() - entry.healthy:
            del entry.replicas[uid]

    def forget(self, endpoint_uid: str) -> None:
        entry = self._endpoints.pop(endpoint_uid, None)
        self._wanted.pop(endpoint_uid, None)
        for uid in entry.running if entry is not None else ():
            self._endpoint_of.pop(uid, None)

    def kernels(self, found: Iterable[fleet_pb2.KernelMeasurement]) -> None:
        """Of an agent. Kernels that the controller does not know as running are left out."""
        now, touched = self._clock_ms(), set()
        for measurement in found:
            uid = self._endpoint_of.get(measurement.uid)
            if uid is None:
                continue
            values = {
                name: value
                for name, value in measurement.values.items()
                if name in KERNEL_METRICS and math.isfinite(value) and value >= 0
            }
            self._entry(uid).kernels[measurement.uid] = (now, values)
            touched.add(uid)
        for uid in touched:
            self._changed(uid)

    def proxy(self, proxy: str, found: Iterable[routing_pb2.EndpointMeasurement]) -> None:
        """Of a proxy, by its uid."""
        now = self._clock_ms()
        for measurement in found:
            entry = self._endpoints.get(measurement.endpoint_uid)
            if entry is None:
                continue
            span_s = max(measurement.span_ms, 1) / 1000
            answered = sum(measurement.answered.values())
            bounds = tuple(measurement.latency_bounds_ms)
            entry.traffic[proxy] = Traffic(
                now,
                rps=answered / span_s,
                concurrency=measurement.concurrency,
                queue=measurement.queue,
                errors_per_second=(measurement.answered.get(5, 0) + measurement.answered.get(0, 0)) / span_s,
                latency=Buckets(bounds, tuple(measurement.latency)),
                first_byte=Buckets(bounds, tuple(measurement.first_byte)),
            )
            if measurement.arrived or measurement.concurrency or measurement.queue:
                entry.active_ms = now
            for replica in measurement.replicas:
                if replica.HasField("scrape") and replica.replica_uid in entry.healthy:
                    self._scrape(entry, replica.replica_uid, replica.scrape, now)
            self._changed(measurement.endpoint_uid)

    def held(self, endpoint_uid: str) -> None:
        """A proxy holds requests for an endpoint."""
        entry = self._endpoints.get(endpoint_uid)
        if entry is None:
            # One that is gone, or that the controller has not come to: proxies say it with every report.
            return
        entry.held_ms = entry.active_ms = self._clock_ms()
        self._changed(endpoint_uid)

    def is_held(self, endpoint_uid: str) -> bool:
        entry = self._endpoints.get(endpoint_uid)
        return entry is not None and entry.held_ms > 0 and self._clock_ms() - entry.held_ms < 3_000

    def serving_since_ms(self, endpoint_uid: str) -> int:
        """Since when a replica takes traffic, 0 if none ever did."""
        entry = self._endpoints.get(endpoint_uid)
        return entry.serving_ms if entry is not None else 0

    def active_ms(self, endpoint_uid: str) -> int:
        """When a request was last seen, 0 for never."""
        entry = self._endpoints.get(endpoint_uid)
        return entry.active_ms if entry is not None else 0

    def close_proxy(self, proxy: str) -> None:
        """What a proxy that is gone last said is not what happens now."""
        for entry in self._endpoints.values():
            entry.traffic.pop(proxy, None)

    def samples(self, endpoint_uid: str) -> dict[Key, Sample]:
        """A sample for each metric that rules name, over each window that they name it with."""
        wanted = self._wanted.get(endpoint_uid, {})
        entry = self._endpoints.get(endpoint_uid)
        if entry is None or not wanted:
            return {}
        now, found = self._clock_ms(), {}
        for (source, name), windows in wanted.items():
            newest = self._newest(entry, source, name)
            series = entry.series.setdefault((source, name), Series())
            series.keep_ms = max(*windows, FORGET_MS)
            if newest is not None and (not series.values or newest[0] > series.values[-1][0]):
                series.add(*newest)
            for window_ms in windows:
                over = series.over(now, window_ms)
                if over is not None:
                    found[source, name, window_ms] = Sample(over[0], over[1], STALE_MS[source])
        return found

    def known(self, endpoint_uid: str) -> list[tuple[Source, str, float, int]]:
        """Every metric that a rule could name now: source, name, value, age in ms."""
        entry = self._endpoints.get(endpoint_uid)
        if entry is None:
            return []
        now = self._clock_ms()
        names = [(Source.PROXY, name) for name in PROXY_METRICS]
        names += [(Source.KERNEL, name) for name in KERNEL_METRICS]
        shown: set[str] = set()
        for replica in entry.replicas.values():
            shown |= replica.names()
        names += [(Source.INFERENCE_FRAMEWORK, name) for name in sorted(shown)]
        result = []
        for source, name in names:
            newest = self._newest(entry, source, name)
            if newest is not None:
                result.append((source, name, newest[1], now - newest[0]))
        return result

    def scrape_errors(self, endpoint_uid: str) -> dict[str, str]:
        """Why replicas (by uid) could not be scraped."""
        entry = self._endpoints.get(endpoint_uid)
        if entry is None:
            return {}
        return {uid: replica.error for uid, replica in entry.replicas.items() if replica.error}

    def traffic(self, endpoint_uid: str) -> Traffic | None:
        """What all proxies together see; None if none has said anything lately."""
        entry = self._endpoints.get(endpoint_uid)
        fresh = self._fresh_traffic(entry) if entry is not None else []
        if not fresh:
            return None
        latency, first_byte = fresh[0].latency, fresh[0].first_byte
        for one in fresh[1:]:
            latency, first_byte = latency.plus(one.latency), first_byte.plus(one.first_byte)
        return Traffic(
            min(one.at_ms for one in fresh),
            sum(one.rps for one in fresh),
            sum(one.concurrency for one in fresh),
            sum(one.queue for one in fresh),
            sum(one.errors_per_second for one in fresh),
            latency,
            first_byte,
        )

    def kernel_usage(self, kernel_uids: Iterable[str], endpoint_uid: str) -> dict[str, float]:
        """Sum of what these kernels of an endpoint use now, by metric."""
        entry = self._endpoints.get(endpoint_uid)
        total: dict[str, float] = {}
        now = self._clock_ms()
        for uid in kernel_uids:
            at_ms, values = (entry.kernels.get(uid) if entry is not None else None) or (0, {})
            if now - at_ms < FORGET_MS:
                for name, value in values.items():
                    total[name] = total.get(name, 0.0) + value
        return total

    def _entry(self, endpoint_uid: str) -> _Endpoint:
        return self._endpoints.setdefault(endpoint_uid, _Endpoint())

    def _fresh_traffic(self, entry: _Endpoint) -> list[Traffic]:
        now = self._clock_ms()
        for proxy, traffic in list(entry.traffic.items()):
            if now - traffic.at_ms > FORGET_MS:
                del entry.traffic[proxy]
        return list(entry.traffic.values())

    def _newest(self, entry: _Endpoint, source: Source, name: str) -> tuple[int, float] | None:
        """The value over all running kernels or healthy replicas, and when its oldest part was measured."""
        if source is Source.PROXY:
            return self._newest_traffic(entry, name, max(1, len(entry.healthy)))
        if source is Source.KERNEL:
            return self._newest_kernel(entry, name)
        return self._newest_scraped(entry, name)

    def _newest_traffic(self, entry: _Endpoint, name: str, replicas: int) -> tuple[int, float] | None:
        fresh = self._fresh_traffic(entry)
        if not fresh:
            return None
        at_ms = min(traffic.at_ms for traffic in fresh)
        plain = {
            "requests_per_second": lambda traffic: traffic.rps,
            "concurrency": lambda traffic: traffic.concurrency,
            "queue": lambda traffic: traffic.queue,
        }.get(name)
        if plain is not None:
            return at_ms, sum(plain(traffic) for traffic in fresh) / replicas
        family, _, quantile = name.partition(":")
        if family not in ("latency", "first_byte") or quantile not in QUANTILES:
            return None
        merged = getattr(fresh[0], family)
        for traffic in fresh[1:]:
            merged = merged.plus(getattr(traffic, family))
        value = merged.quantile(QUANTILES[quantile])
        return (at_ms, value) if value is not None else None

    def _newest_kernel(self, entry: _Endpoint, name: str) -> tuple[int, float] | None:
        values = [(at, kernel[name]) for at, kernel in entry.kernels.values() if name in kernel]
        if not values:
            return None
        return min(at for at, _ in values), sum(value for _, value in values) / len(values)

    def _newest_scraped(self, entry: _Endpoint, name: str) -> tuple[int, float] | None:
        family, _, quantile = name.rpartition(":")
        values: list[float] = []
        merged: Buckets | None = None
        times: list[int] = []
        for replica in entry.replicas.values():
            if replica.error or replica.newest is None:
                continue
            value = replica.value(name)
            if value is not None:
                values.append(value)
                times.append(replica.newest.at_ms)
            elif quantile in QUANTILES and (found := replica.observed(family)) is not None:
                merged = found if merged is None else merged.plus(found)
                times.append(replica.newest.at_ms)
        if values:
            return min(times), sum(values) / len(values)
        value = merged.quantile(QUANTILES[quantile]) if merged is not None else None
        return (min(times), value) if value is not None else None

    def _scrape(self, entry: _Endpoint, uid: str, scrape: routing_pb2.Scrape, now: int) -> None:
        replica = entry.replicas.setdefault(uid, _Replica())
        replica.error = scrape.error
        if scrape.error:
            return
        at_ms = now - min(scrape.age_ms, FORGET_MS)
        if replica.newest is not None and at_ms <= replica.newest.at_ms:
            return
        # The messages' own maps: the report is of no other use, and most of it is never looked at.
        replica.before = replica.newest
        replica.newest = _Look(at_ms, scrape.gauges, scrape.counters, scrape.histograms)
