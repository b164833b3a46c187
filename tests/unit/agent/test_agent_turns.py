"""Who may start on a device, whatever order kernels come, start, become healthy and go in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dure.agent.turns import TURN_MAX_S, Turns, turn_s

UIDS = [f"k{number}" for number in range(6)]
DEVICES = st.dictionaries(
    st.sampled_from(UIDS), st.frozensets(st.sampled_from(["a", "b", "c"]), min_size=1), min_size=1
)


@given(DEVICES, st.data())
def test_two_never_start_on_one_device_and_all_come_to_their_turn(
    devices: dict[str, frozenset[str]], data: st.DataObject
) -> None:
    turns, started = Turns(), []
    arrived = data.draw(st.permutations(list(devices)))
    for uid in arrived:
        turns.enter(uid, f"session-{uid}", uid, devices[uid])
    waiting, starting = list(arrived), []
    while waiting or starting:
        free = [uid for uid in waiting if not turns.before(uid, 0.0)]
        # Somebody can always go on.
        assert free or starting
        if free and (not starting or data.draw(st.booleans())):
            uid = data.draw(st.sampled_from(free))
            assert not any(devices[uid] & devices[other] for other in starting)
            turns.begin(uid, 100.0)
            waiting.remove(uid)
            starting.append(uid)
            started.append(uid)
        elif starting:
            uid = data.draw(st.sampled_from(starting))
            starting.remove(uid)
            assert turns.leave(uid)
            assert not turns.leave(uid)
    # Those that share a device started as they came.
    for place, uid in enumerate(started):
        for later in started[place + 1 :]:
            if devices[uid] & devices[later]:
                assert arrived.index(uid) < arrived.index(later)


def test_a_turn_is_over_when_its_time_is_up() -> None:
    turns = Turns()
    turns.enter("first", "s1", "one", ["a"])
    turns.enter("second", "s2", "two", ["a", "b"])
    turns.enter("third", "s3", "three", ["b"])
    turns.begin("first", 10.0)
    assert [one.name for one in turns.before("second", 9.9)] == ["one"]
    assert turns.before("second", 10.0) == []
    # One that waits is waited for, too: it came before.
    assert [one.name for one in turns.before("third", 10.0)] == ["two"]
    turns.leave("second")
    assert turns.before("third", 0.0) == []
    turns.begin("gone", 10.0)


def test_kernels_of_one_session_start_together() -> None:
    turns = Turns()
    turns.enter("main1", "s1", "one", ["a"])
    turns.enter("sub1", "s1", "one", ["a"])
    turns.enter("other", "s2", "two", ["a"])
    assert turns.before("sub1", 0.0) == []
    assert len(turns.before("other", 0.0)) == 2


def test_how_long_a_turn_is() -> None:
    assert turn_s(60, 10, 5) == 120
    assert turn_s(10_000, 10, 5) == TURN_MAX_S
