"""Which proxies there are, and whether one that is missed may still see traffic."""

from dure.manager.hub import START_MS, Hub, Proxy
from dure.routing.v1 import routing_pb2


def proxy(name: str, group: str = "default") -> Proxy:
    return Proxy(name, name, group, routing_pb2.Hello())


class Clock:
    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


def test_a_lost_proxy_is_missed_for_a_while_and_no_longer_when_it_is_back() -> None:
    clock = Clock()
    hub = Hub("t", [], clock)
    started_ms = clock.now_ms

    def away() -> bool:
        return hub.away("default", max_ms=60_000, started_ms=started_ms)

    first, second = proxy("a"), proxy("b")
    hub.opened(first)
    assert away(), "not all may have come yet"
    clock.now_ms += START_MS
    assert not away()
    hub.opened(second)
    assert hub.members("default") == ["a", "b"]
    hub.closed(second)
    assert away() and hub.members("default") == ["a"]
    assert not hub.away("other", max_ms=60_000, started_ms=started_ms)
    hub.opened(proxy("b"))
    assert not away()
    hub.closed(hub.proxies["b"])
    clock.now_ms += 60_000
    assert not away(), "it is not coming back"


def test_a_group_is_watched_while_there_is_a_proxy() -> None:
    clock = Clock()
    hub = Hub("t", [], clock)
    assert hub.watched_since_ms("default") is None
    first, second = proxy("a"), proxy("b")
    hub.opened(first)
    since_ms = hub.watched_since_ms("default")
    clock.now_ms += 5_000
    hub.opened(second)
    hub.closed(first)
    assert hub.watched_since_ms("default") == since_ms
    hub.closed(second)
    assert hub.watched_since_ms("default") is None


def test_every_update_names_the_members_of_the_group() -> None:
    hub = Hub("t", [])
    revision = hub.revision
    hub.opened(proxy("a"))
    hub.opened(proxy("x", "other"))
    assert hub.revision > revision
    assert list(hub.updates_after("t", revision, "default")[-1].members) == ["a"]
