"""What it costs to look at scaling rules: 1,000 endpoints of 3 rules and 5 replicas, measured every second.

The manager's own path, without the network: two proxies report each endpoint once a second, the replicas' own
metrics are scraped, and each endpoint is looked at once a second. Bound: 20% of a core.
"""

from __future__ import annotations

import time

from dure.manager.measures import Measures
from dure.routing.v1 import routing_pb2
from dure.scaling.decide import decide
from dure.scaling.values import Comparator, Rule, Situation, Source

ENDPOINTS, REPLICAS, PROXIES, SECONDS = 1_000, 5, 2, 10
BOUND = 0.20
BOUNDS_MS = [1.0 * 1.8**power for power in range(20)]
RULES = (
    Rule("busy", Source.PROXY, "concurrency", Comparator.GREATER_THAN, 1e9, 1, window_ms=10_000),
    Rule("slow", Source.PROXY, "latency:p95", Comparator.GREATER_THAN, 1e9, 1),
    Rule("full", Source.INFERENCE_FRAMEWORK, "vllm:num_requests_waiting", Comparator.GREATER_THAN, 1e9, 1),
)


def reports(uid: str, first: bool, second: int) -> routing_pb2.EndpointMeasurement:
    """What a proxy says of an endpoint after a second; the first one scrapes its replicas, too."""
    message = routing_pb2.EndpointMeasurement(
        endpoint_uid=uid,
        span_ms=1000,
        arrived=100,
        answered={2: 100},
        concurrency=10,
        latency=[5] * (len(BOUNDS_MS) + 1),
        first_byte=[5] * (len(BOUNDS_MS) + 1),
        latency_bounds_ms=BOUNDS_MS,
    )
    for number in range(REPLICAS):
        replica = message.replicas.add(replica_uid=f"{uid}-{number}", answered=20, concurrency=2)
        if first:
            replica.scrape.gauges["vllm:num_requests_waiting"] = 3
            for counter in range(20):
                replica.scrape.counters[f"vllm:counter_{counter}_total"] = second * 100.0
    return message


def main() -> None:
    now = [0]
    dirty: dict[str, None] = {}
    measures = Measures(lambda: now[0], lambda uid: dirty.__setitem__(uid, None))
    uids = [f"endpoint-{number:04}" for number in range(ENDPOINTS)]
    for uid in uids:
        measures.compose(uid, [f"{uid}-{number}" for number in range(REPLICAS)], [])
        measures.want(uid, [(rule.source, rule.metric, rule.window_ms) for rule in RULES])
    wire = [
        [[reports(uid, proxy == 0, second).SerializeToString() for uid in uids] for proxy in range(PROXIES)]
        for second in range(2)
    ]
    looked, taken_s, decided_s = 0, 0.0, 0.0
    for second in range(SECONDS):
        now[0] += 1000
        started = time.process_time()
        for proxy in range(PROXIES):
            found = [routing_pb2.EndpointMeasurement.FromString(data) for data in wire[second % 2][proxy]]
            measures.proxy(f"proxy-{proxy}", found)
        taken = time.process_time()
        for uid in list(dirty):
            decide(RULES, measures.samples(uid), Situation(now[0], REPLICAS))
            looked += 1
        dirty.clear()
        taken_s += taken - started
        decided_s += time.process_time() - taken
    assert looked == ENDPOINTS * SECONDS
    share = (taken_s + decided_s) / SECONDS
    print(
        f"scaling: {ENDPOINTS} endpoints, {len(RULES)} rules and {REPLICAS} replicas each, {PROXIES} proxies"
    )
    print(
        f"  reports {taken_s / SECONDS:.1%}, decisions {decided_s / SECONDS:.1%} of a core "
        f"({decided_s / looked * 1e6:.0f} us a look)"
    )
    print(f"  bound {BOUND:.0%} of a core: {'kept' if share < BOUND else 'BROKEN'} ({share:.1%})")


if __name__ == "__main__":
    main()
