"""What reports say of traffic and scrapes, and who scrapes whom."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dure.appproxy import measuring
from dure.appproxy.measuring import Measuring, Scraped, Seen
from dure.appproxy.meter import ABORTED, LATENCY_BOUNDS_S, EndpointMeter, replica_finished
from dure.appproxy.table import scraper_of
from dure.routing.v1 import routing_pb2 as pb


def _world(count: int, replicas: int = 1) -> dict[str, Seen]:
    return {
        f"e{n:04}": Seen(EndpointMeter("p", f"n{n}"), tuple(f"e{n:04}-r{r}" for r in range(replicas)))
        for n in range(count)
    }


def _all(measuring_: Measuring, world: dict[str, Seen], now_s: float) -> list[pb.EndpointMeasurement]:
    found: list[pb.EndpointMeasurement] = []
    while piece := measuring_.take(world, {}, now_s):
        assert len(piece) <= measuring.ENDPOINTS_PER_REPORT_MAX
        found += piece
    return found


def test_differences_and_what_is_now() -> None:
    world = _world(1)
    meter = world["e0000"].meter
    meter.finished(200, 0.03)  # before the stream: nobody is told
    told = Measuring()
    told.start(world, 10.0)
    meter.arrived += 4
    meter.finished(200, 0.03)
    meter.finished(404, 0.2)
    meter.finished(ABORTED, 0.2)
    meter.began(0.004)
    meter.refused(503, "queue_timeout", admitted=True)
    meter.refused(401, "token_missing", admitted=False)
    meter.in_flight, meter.queued, meter.held = 5, 1, 2
    meter.bytes_in, meter.bytes_out = 10, 20
    replica_finished(meter.replica("e0000-r0"), 200)
    meter.replica("e0000-r0").in_flight = 2
    (one,) = told.take(world, {}, 11.5)
    assert one.span_ms == 1500
    assert dict(one.answered) == {2: 1, 4: 1, 5: 1, 0: 1}
    assert (one.arrived, one.concurrency, one.queue, one.bytes_in, one.bytes_out) == (4, 5, 3, 10, 20)
    assert list(one.latency_bounds_ms) == pytest.approx([bound * 1000 for bound in LATENCY_BOUNDS_S])
    assert len(one.latency) == len(one.first_byte) == len(one.latency_bounds_ms) + 1
    assert one.latency[LATENCY_BOUNDS_S.index(0.035)] == 1 and sum(one.latency) == 3
    assert one.first_byte[LATENCY_BOUNDS_S.index(0.005)] == 1 and sum(one.first_byte) == 1
    assert [(r.replica_uid, r.answered, r.concurrency) for r in one.replicas] == [("e0000-r0", 1, 2)]
    # And the next second starts at nothing.
    meter.in_flight = meter.queued = meter.held = 0
    (one,) = told.take(world, {}, 12.5)
    assert (one.span_ms, one.arrived, one.concurrency, dict(one.answered)) == (1000, 0, 0, {})
    assert sum(one.latency) == 0


def test_every_second_after_traffic_and_every_five_when_quiet() -> None:
    world, told = _world(2), Measuring()
    # Without a replica a quiet endpoint is not worth a word.
    world["e0001"] = Seen(world["e0001"].meter, ())
    told.start(world, 0.0)
    at: dict[str, list[int]] = {"e0000": [], "e0001": []}
    for second in range(1, 200):
        if second in (100, 101):
            world["e0000"].meter.arrived += 1
        for one in _all(told, world, float(second)):
            at[one.endpoint_uid].append(second)
    busy = [second for second in at["e0000"] if 100 <= second < 160]
    assert busy == list(range(100, 160))
    quiet = [second for second in at["e0000"] if second >= 165]
    assert quiet and all(later - sooner == 5 for sooner, later in pairwise(quiet))
    # The minute after the stream began counts as busy, for both.
    assert at["e0001"] == list(range(1, 60))


def test_reports_are_bounded_and_nobody_is_left_out() -> None:
    world, told = _world(450), Measuring()
    told.start(world, 0.0)
    for seen in world.values():
        seen.meter.arrived += 1
    for second in (1.0, 2.0):
        found = _all(told, world, second)
        assert Counter(one.endpoint_uid for one in found) == dict.fromkeys(world, 1)
    assert told.take(world, {}, 2.5) == []


def test_an_endpoint_that_comes_and_one_that_goes() -> None:
    world, told = _world(1), Measuring()
    told.start({}, 0.0)
    assert told.take(world, {}, 1.0) == []
    world["e0000"].meter.arrived = 3
    (one,) = told.take(world, {}, 2.0)
    assert (one.arrived, one.span_ms) == (3, 1000)
    assert told.take({}, {}, 3.0) == []


def _scrape(size: int, value: float = 1.0) -> pb.Scrape:
    return pb.Scrape(gauges={f"{'g' * 100}{n}": value for n in range(size)})


def test_each_scrape_is_told_once_with_its_age() -> None:
    world, told = _world(1, replicas=2), Measuring()
    told.start(world, 0.0)
    scrapes = {
        "e0000-r0": Scraped(0.75, pb.Scrape(gauges={"a": 1})),
        "e0000-r1": Scraped(0.5, pb.Scrape(error="status 500")),
    }
    (one,) = told.take(world, scrapes, 1.0)
    assert {r.replica_uid: (r.scrape.age_ms, r.scrape.error) for r in one.replicas} == {
        "e0000-r0": (250, ""),
        "e0000-r1": (500, "status 500"),
    }
    assert not scrapes["e0000-r0"].message.age_ms
    scrapes["e0000-r1"] = Scraped(1.5, pb.Scrape(gauges={"a": 1}))
    (one,) = told.take(world, scrapes, 2.0)
    assert [r.replica_uid for r in one.replicas] == ["e0000-r1"]


def test_scrapes_fill_reports_up_to_the_bound_and_take_turns() -> None:
    world, told = _world(3, replicas=30), Measuring()
    told.start(world, 0.0)
    seen: Counter[str] = Counter()
    for second in range(1, 13):
        scrapes = {uid: Scraped(second - 0.1, _scrape(500)) for s in world.values() for uid in s.replicas}
        while found := told.take(world, scrapes, float(second)):
            size = pb.Report(measurements=found).ByteSize()
            assert size < measuring.BYTES_PER_REPORT_MAX + 16 * 1024
            seen.update(r.replica_uid for one in found for r in one.replicas if r.HasField("scrape"))
    assert len(seen) == 90
    assert max(seen.values()) - min(seen.values()) <= 1


_members = st.lists(st.from_regex(r"[a-z0-9]{1,6}", fullmatch=True), min_size=1, max_size=5, unique=True)


@given(_members, st.uuids().map(str))
def test_all_members_agree_whatever_the_order(members: list[str], uid: str) -> None:
    chosen = scraper_of(members, uid)
    assert chosen in members
    assert scraper_of(list(reversed(members)), uid) == chosen


@given(_members, st.uuids().map(str))
def test_only_what_a_lost_member_had_moves(members: list[str], uid: str) -> None:
    before = scraper_of(members, uid)
    for lost in members:
        left = [member for member in members if member != lost]
        if left and lost != before:
            assert scraper_of(left, uid) == before


def test_members_share_evenly_and_without_members_it_is_nobody() -> None:
    shares = Counter(scraper_of(("a", "b", "c"), f"replica-{n}") for n in range(3000))
    assert all(800 < count < 1200 for count in shares.values())
    assert scraper_of((), "r") == ""
