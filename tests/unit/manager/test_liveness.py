"""When agents are lost, and when they are given up on."""

from dure.manager.liveness import (
    ARRIVAL_MS,
    CLOSED_GRACE_MS,
    GIVE_UP_MS,
    GIVE_UP_PAUSE_MS,
    SILENCE_MS,
    Sighting,
    given_up,
    status_of,
)
from dure.manager.model import AgentStatus


def test_a_closed_stream_and_silence() -> None:
    closed = Sighting("g", heard_ms=0, closed_ms=0, connected=True)
    assert status_of(closed, 0, CLOSED_GRACE_MS - 1) is AgentStatus.ALIVE
    assert status_of(closed, 0, CLOSED_GRACE_MS) is AgentStatus.LOST
    silent = Sighting("g", heard_ms=0, closed_ms=None, connected=True)
    assert status_of(silent, 0, SILENCE_MS - 1) is AgentStatus.ALIVE
    assert status_of(silent, 0, SILENCE_MS) is AgentStatus.LOST


def test_a_new_manager_waits_for_everyone() -> None:
    known = Sighting("g", heard_ms=100, closed_ms=None, connected=False)
    assert status_of(known, 100, 100 + ARRIVAL_MS - 1) is AgentStatus.AWAITED
    assert status_of(known, 100, 100 + ARRIVAL_MS) is AgentStatus.LOST


def test_a_restart_within_15_s_is_not_given_up_on() -> None:
    closed = {"a": Sighting("g", 0, 0, True)}
    assert given_up(closed, 0, 15_000) == frozenset()
    assert given_up(closed, 0, GIVE_UP_MS) == {"a"}


def test_when_many_vanish_one_batch_goes_at_a_time() -> None:
    agents = {f"a{index}": Sighting("g", 0, 0, True) for index in range(10)}
    assert len(given_up(agents, 0, GIVE_UP_MS)) == 2
    assert len(given_up(agents, 0, GIVE_UP_MS + GIVE_UP_PAUSE_MS)) == 4
    assert len(given_up({"x": Sighting("h", 0, 0, True), **agents}, 0, GIVE_UP_MS)) == 3
