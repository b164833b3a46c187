"""From what agents and proxies report to one value per endpoint and metric."""

from __future__ import annotations

from typing import Any

import pytest

from dure.fleet.v1 import fleet_pb2
from dure.manager.measures import STALE_MS, Measures
from dure.routing.v1 import routing_pb2
from dure.scaling.values import Source

BOUNDS = [10.0, 100.0]


class World:
    """An endpoint `e` of two healthy replicas, `r1` and `r2`, of a kernel each, and the clock."""

    def __init__(self) -> None:
        self.now_ms = 100_000
        self.changed: list[str] = []
        self.measures = Measures(lambda: self.now_ms, self.changed.append)
        self.measures.compose("e", ["r1", "r2"], ["k1", "k2"])

    def want(self, source: Source, name: str, window_ms: int = 0) -> None:
        self.measures.want("e", [(source, name, 0), (source, name, window_ms)])

    def value(self, source: Source, name: str, window_ms: int = 0) -> float | None:
        sample = self.measures.samples("e").get((source, name, window_ms))
        return sample.value if sample is not None else None

    def reports(self, proxy: str = "p1", uid: str = "e", **fields: Any) -> None:
        answered = fields.pop("answered", 0)
        replicas = fields.pop("replicas", ())
        message = routing_pb2.EndpointMeasurement(
            endpoint_uid=uid, span_ms=1000, latency_bounds_ms=BOUNDS, answered={2: answered}, **fields
        )
        message.replicas.extend(replicas)
        self.measures.proxy(proxy, [message])

    def kernel(self, uid: str, **values: float) -> None:
        self.measures.kernels([fleet_pb2.KernelMeasurement(uid=uid, values=values)])


def scrape(uid: str, age_ms: int = 0, error: str = "", **fields: Any) -> routing_pb2.ReplicaMeasurement:
    found = routing_pb2.Scrape(age_ms=age_ms, error=error, **fields)
    return routing_pb2.ReplicaMeasurement(replica_uid=uid, scrape=found)


def test_traffic_is_the_sum_of_the_proxies_over_the_healthy_replicas() -> None:
    world = World()
    for name in ("requests_per_second", "concurrency", "latency:p50"):
        world.want(Source.PROXY, name)
        world.reports("p1", answered=30, concurrency=6, latency=[10, 0, 0])
        world.reports("p2", answered=10, concurrency=2, latency=[0, 30, 0])
        expected = {"requests_per_second": 20.0, "concurrency": 4.0, "latency:p50": pytest.approx(40.0)}
        assert world.value(Source.PROXY, name) == expected[name]
        world.now_ms += 10
    world.measures.close_proxy("p2")
    world.want(Source.PROXY, "concurrency")
    assert world.value(Source.PROXY, "concurrency") == 3.0
    assert set(world.changed) == {"e"}


def test_kernels_that_ended_are_not_averaged_and_those_of_others_are_not_taken() -> None:
    world = World()
    world.want(Source.KERNEL, "cpu_util")
    world.kernel("k1", cpu_util=90.0)
    world.kernel("k2", cpu_util=10.0)
    world.kernel("stranger", cpu_util=1000.0)
    assert world.value(Source.KERNEL, "cpu_util") == 50.0
    world.measures.compose("e", ["r2"], ["k2"])
    world.now_ms += 1
    world.kernel("k2", cpu_util=20.0)
    assert world.value(Source.KERNEL, "cpu_util") == 20.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_absurd_kernel_values_are_left_out(value: float) -> None:
    world = World()
    world.want(Source.KERNEL, "mem")
    world.kernel("k1", mem=value)
    assert world.value(Source.KERNEL, "mem") is None


def test_scraped_gauges_rates_and_quantiles() -> None:
    world = World()
    source = Source.INFERENCE_FRAMEWORK
    names = ("waiting", "done_total", "wait_seconds:p95")
    world.measures.want("e", [(source, name, 0) for name in names])
    bounds = [0.5, 1.0, float("inf")]
    for step in (0, 1):
        for replica, waiting in (("r1", 4.0), ("r2", 8.0)):
            counts = [0.0, 10.0 * step, 10.0 * step]
            page = scrape(
                replica,
                gauges={"waiting": waiting},
                counters={"done_total": 100.0 * step},
                histograms={"wait_seconds": routing_pb2.Histogram(bounds=bounds, counts=counts)},
            )
            world.reports(replicas=[page])
        world.now_ms += 2_000
    assert world.value(source, "waiting") == 6.0
    assert world.value(source, "done_total") == 50.0
    world.want(source, "done")
    assert world.value(source, "done") == 50.0
    world.measures.want("e", [(source, name, 0) for name in names])
    assert world.value(source, "wait_seconds:p95") == pytest.approx(0.975)
    known = {name for found, name, _, _ in world.measures.known("e") if found is source}
    assert known == {"waiting", "done_total", "wait_seconds:p50", "wait_seconds:p95", "wait_seconds:p99"}


def test_counters_that_were_reset_and_scrapes_that_failed_give_no_value() -> None:
    world = World()
    source = Source.INFERENCE_FRAMEWORK
    world.want(source, "done_total")
    for value in (100.0, 3.0):
        world.reports(replicas=[scrape("r1", counters={"done_total": value})])
        world.now_ms += 1_000
    assert world.value(source, "done_total") is None
    world.reports(replicas=[scrape("r2", error="it answers with 500")])
    assert world.measures.scrape_errors("e") == {"r2": "it answers with 500"}
    world.reports(replicas=[scrape("stranger", gauges={"done_total": 1.0})])
    assert world.value(source, "done_total") is None


def test_a_sample_grows_old() -> None:
    world = World()
    world.want(Source.KERNEL, "mem", 10_000)
    for value in (1.0, 3.0):
        world.kernel("k1", mem=value)
        world.measures.samples("e")
        world.now_ms += 1_000
    found = world.measures.samples("e")[Source.KERNEL, "mem", 10_000]
    assert (found.value, found.age_ms, found.stale_after_ms) == (2.0, 1_000, STALE_MS[Source.KERNEL])
    world.now_ms += 5_000
    assert world.measures.samples("e")[Source.KERNEL, "mem", 0].age_ms == 6_000


def test_held_requests_are_seen_at_once_and_not_for_ever() -> None:
    world = World()
    world.measures.held("e")
    assert world.measures.is_held("e") and world.measures.active_ms("e") == world.now_ms
    world.now_ms += 3_000
    assert not world.measures.is_held("e")


def test_what_is_forgotten_is_gone() -> None:
    world = World()
    world.reports(answered=1)
    world.measures.forget("e")
    assert world.measures.traffic("e") is None
    world.kernel("k1", mem=1.0)
    assert world.measures.known("e") == []
