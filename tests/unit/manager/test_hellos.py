"""What agents say of their devices: nonsense is refused, and what changed is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.fleet.v1.fleet_pb2 import Device, Hello
from dure.manager.hellos import DEVICES_MAX, check_devices, checked, have_overlay, news
from dure.wire.errors import InvalidInput


def device(name: str = "GPU-1", **fields: object) -> Device:
    return Device(id=name, **{"healthy": True, "slots": {"cuda.shares": 1000}, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ([device(), device()], "one id"),
        ([device("")], "no id"),
        ([device(slots={"cuda.shares": -1})], "`GPU-1` has negative slots"),
        ([device(parent="GPU-1")], "part of itself"),
        ([device(str(number)) for number in range(DEVICES_MAX + 1)], f"at most {DEVICES_MAX}"),
    ],
)
def test_nonsense(devices: list[Device], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        check_devices(devices)
    with pytest.raises(InvalidInput, match=says):
        checked(Hello(protocol_version=1, devices=devices), "")


def test_a_hello_is_completed() -> None:
    hello = checked(Hello(protocol_version=1, limitations=["x"] * 100), "ipv4:10.0.0.7:1234")
    assert (hello.resource_group, hello.advertise_address, len(hello.limitations)) == (
        "default",
        "10.0.0.7",
        50,
    )
    for bad in (Hello(), Hello(protocol_version=1, slots={"cpu": -1})):
        with pytest.raises(InvalidInput):
            checked(bad, "")


def test_what_went_and_what_came_back() -> None:
    sick = device(healthy=False, detail="fell off the bus")

    def told(before: list[Device], after: list[Device]) -> list[tuple[str, str, bool]]:
        return [(one.reason, one.sentence, one.warning) for one in news(before, after)]

    assert told([device()], [sick]) == [
        ("DEVICE_LOST", "GPU `GPU-1` is out of order: fell off the bus", True)
    ]
    assert told([sick], [device()]) == [("DEVICE_BACK", "GPU `GPU-1` is in order again", False)]
    assert told([device()], []) == [("DEVICE_LOST", "GPU `GPU-1` is not there any more", True)]
    assert told([], [device()]) == [("DEVICE_BACK", "GPU `GPU-1` is there now", False)]
    assert told([device()], [device()]) == []
    # What is sick for another reason is no news, nor is what is better known.
    assert told([sick], [device(healthy=False, detail="still")]) == []
    assert told([device()], [device(model="A100", enforcement="mps")]) == []
    was, now = device(enforcement="hook"), device(enforcement="none")
    assert told([was], [now]) == [
        ("DEVICE_ENFORCEMENT", "GPU `GPU-1` enforces `none`, no longer `hook`", True)
    ]
    assert told([now], [was])[0][2] is False
    both = told([device(), device("GPU-2")], [sick, device("GPU-3")])
    assert [(reason, "GPU-2" in text) for reason, text, _ in both] == [
        ("DEVICE_LOST", False), ("DEVICE_LOST", True), ("DEVICE_BACK", False)
    ]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(["", "s1", "s2"]), st.booleans()), min_size=1, max_size=4))
def test_an_overlay_is_for_agents_of_one_swarm_with_one_that_can_make_it(
    said: list[tuple[str, bool]],
) -> None:
    hellos = [Hello(overlay=name, makes_overlay=makes) for name, makes in said]
    can = {name for name, _ in said} in ({"s1"}, {"s2"}) and True in [makes for _, makes in said]
    assert have_overlay(hellos) == can
