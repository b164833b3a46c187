"""Devices of a node: any sequence of grants keeps the books, and the agent agrees with the manager always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dure.agent.devices import refusal
from dure.fleet.v1 import fleet_pb2
from dure.manager.devices import DeviceCapacity, fit, free_shares, offered, portions, used_shares
from dure.manager.model import DeviceShare, Grant
from dure.wire import enforcement
from dure.wire.quantities import DEVICES, MILLI, SHARES

GPU = {SHARES: MILLI, DEVICES: MILLI}


def gpu(name: str, **fields: object) -> DeviceCapacity:
    return replace(DeviceCapacity(name, GPU), **fields)  # type: ignore[arg-type]


def part(name: str, parent: str, milli: int, **fields: object) -> DeviceCapacity:
    made = DeviceCapacity(name, {SHARES: milli}, parent=parent, enforcement=enforcement.MIG)
    return replace(made, **fields)  # type: ignore[arg-type]


def held(*shares: tuple[str, int]) -> Grant:
    return Grant("n", {}, tuple(DeviceShare(device, SHARES, amount) for device, amount in shares))


def whole(*names: str) -> Grant:
    return Grant("n", {}, tuple(DeviceShare(name, DEVICES, MILLI) for name in names))


def given_out(result: tuple[DeviceShare, ...] | str) -> list[tuple[str, int]]:
    assert not isinstance(result, str), result
    return [(share.device, share.amount) for share in result]


def as_messages(devices: Sequence[DeviceCapacity]) -> dict[str, fleet_pb2.Device]:
    return {
        device.id: fleet_pb2.Device(
            id=device.id, slots=device.slots, healthy=device.healthy, parent=device.parent
        )
        for device in devices
    }


def as_grants(shares: Sequence[DeviceShare]) -> list[fleet_pb2.DeviceGrant]:
    return [fleet_pb2.DeviceGrant(device=s.device, slot=s.slot, amount=s.amount) for s in shares]


# A node: of each GPU whether it is whole, whether it is healthy, its mode, and how its parts are cut.
modes = st.sampled_from(enforcement.MODES)
cut = st.lists(st.sampled_from([140, 280, 420, 570]), min_size=1, max_size=3)
distances = st.lists(st.sampled_from([0, 10, 20, 30, 40, 50]), min_size=28, max_size=28)


@st.composite
def nodes(draw: st.DrawFn) -> list[DeviceCapacity]:
    found: list[DeviceCapacity] = []
    for index in range(draw(st.integers(1, 5))):
        name = f"g{index}"
        sizes = draw(st.none() | st.none() | cut)
        healthy = draw(st.sampled_from([True, True, True, False]))
        # A GPU that was divided stays known, sick, or is listed beside its parts by an agent that is wrong.
        if sizes is None or draw(st.booleans()):
            found.append(gpu(name, healthy=healthy and sizes is None, enforcement=draw(modes)))
        for number, milli in enumerate(sizes or ()):
            found.append(part(f"{name}-{number}", name, milli, healthy=healthy))
    ways = draw(distances)
    pairs = zip(combinations([device.id for device in found], 2), ways, strict=False)
    table: dict[str, dict[str, int]] = {device.id: {} for device in found}
    for (one, other), way in pairs:
        table[one][other] = table[other][one] = way
    return [replace(device, distances=table[device.id]) for device in found]


# Some that leave room for a smaller portion and not for one that is a milli-share larger.
amounts = st.integers(1, 260).map(lambda hundredths: hundredths * 10)
odd = st.sampled_from([166, 167, 168, 499, 500, 501, 1001, 2498, 2500, 2501])
shares = st.one_of(amounts, amounts, odd).map(lambda amount: {SHARES: amount})
wholes = st.integers(1, 4).map(lambda count: {DEVICES: count * MILLI})
steps = st.one_of(
    st.tuples(st.just("place"), st.one_of(shares, wholes), st.sampled_from(["", "", *enforcement.MODES])),
    st.tuples(st.just("place"), shares, st.just("")),
    st.tuples(st.just("end"), st.integers(0, 100), st.just("")),
    st.tuples(st.just("flip"), st.integers(0, 100), st.just("")),
    st.tuples(st.just("divide"), st.integers(0, 100), st.just("")),
)


@settings(max_examples=250, deadline=None)
@given(nodes(), st.lists(steps, min_size=15, max_size=40))
def test_any_sequence_keeps_the_books_and_the_agent_agrees(
    devices: list[DeviceCapacity], sequence: list[tuple[str, object, str]]
) -> None:
    kernels: list[Grant] = []
    for what, argument, least in sequence:
        if what == "end" and kernels:
            assert isinstance(argument, int)
            kernels.pop(argument % len(kernels))
        elif what == "flip":
            # It falls off the bus, or comes back; what it gave stays given.
            assert isinstance(argument, int)
            index = argument % len(devices)
            devices[index] = replace(devices[index], healthy=not devices[index].healthy)
        elif what == "divide":
            # A GPU goes into MIG mode, or out of it; what is listed of the other kind is not there.
            assert isinstance(argument, int)
            name = devices[argument % len(devices)].id.split("-")[0]
            on = any(device.parent == name and device.healthy for device in devices)
            devices = [
                replace(d, healthy=bool(d.parent) != on) if name in (d.id, d.parent) else d for d in devices
            ]
        elif what == "place":
            assert isinstance(argument, dict)
            result = fit(argument, least, devices, kernels)
            if isinstance(result, str):
                assert result
                assert not could_be_had(argument, least, devices, kernels), result
            else:
                check_grant(argument, least, devices, result)
                assert agent_says(devices, kernels, result) == ""
                kernels.append(Grant("n", {}, result))
        check_books(devices, kernels)


def agent_says(
    devices: Sequence[DeviceCapacity], kernels: Sequence[Grant], wanted: Sequence[DeviceShare]
) -> str:
    others = [as_grants(kernel.devices) for kernel in kernels]
    return refusal(as_grants(wanted), as_messages(devices), others)


def check_grant(
    slots: Mapping[str, int], least: str, devices: Sequence[DeviceCapacity], result: Sequence[DeviceShare]
) -> None:
    by_id = {device.id: device for device in devices}
    ((slot, wanted),) = slots.items()
    assert sum(share.amount for share in result) == wanted
    assert {share.slot for share in result} == {slot}
    assert len({share.device for share in result}) == len(result)
    used = [by_id[share.device] for share in result]
    assert all(device.healthy for device in used)
    assert len(result) == 1 or not any(device.parent for device in used)
    if slot == SHARES:
        assert [share.amount for share in result] == portions(wanted)
        assert all(enforcement.rank(device.enforcement) >= enforcement.rank(least) for device in used)


def could_be_had(
    slots: Mapping[str, int], least: str, devices: Sequence[DeviceCapacity], kernels: Sequence[Grant]
) -> bool:
    """Whether the agent would take some grant that the request could be answered with."""
    ((slot, wanted),) = slots.items()
    sizes = portions(wanted) if slot == SHARES else [MILLI] * (wanted // MILLI)
    able = [
        device
        for device in devices
        if (slot == DEVICES or enforcement.rank(device.enforcement) >= enforcement.rank(least))
        and not (len(sizes) > 1 and device.parent)
    ]

    def takers(size: int) -> int:
        return sum(not agent_says(devices, kernels, [DeviceShare(d.id, slot, size)]) for d in able)

    return takers(sizes[-1]) >= len(sizes) and takers(sizes[0]) >= sizes.count(sizes[0])


def check_books(devices: Sequence[DeviceCapacity], kernels: Sequence[Grant]) -> None:
    by_id = {device.id: device for device in devices}
    for device in devices:
        parts = [share for kernel in kernels for share in kernel.devices if share.device == device.id]
        assert sum(share.amount for share in parts) <= device.slots[SHARES]
        assert len({share.slot for share in parts}) <= 1
        if device.parent or (parts and parts[0].slot == DEVICES):
            assert len(parts) <= 1
        if parts and device.parent in by_id:
            assert not any(s.device == device.parent for kernel in kernels for s in kernel.devices)
    used = used_shares(devices, kernels)
    assert all(0 <= used[device.id] <= device.slots[SHARES] for device in devices)
    room = sum(
        device.slots[SHARES] - used[device.id] for device in offered(devices, kernels) if device.healthy
    )
    assert free_shares(devices, kernels) == room


wild = st.lists(
    st.tuples(st.integers(0, 7), st.sampled_from([SHARES, SHARES, DEVICES]), st.integers(0, 150)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=400, deadline=None)
@given(nodes(), st.lists(shares, max_size=4), wild)
def test_the_agent_refuses_what_the_manager_never_places(
    devices: list[DeviceCapacity], before: list[dict[str, int]], wanted: list[tuple[int, str, int]]
) -> None:
    kernels: list[Grant] = []
    for slots in before:
        result = fit(slots, "", devices, kernels)
        if not isinstance(result, str):
            kernels.append(Grant("n", {}, result))
    grant = [
        DeviceShare(devices[index % len(devices)].id, slot, hundredths * 10)
        for index, slot, hundredths in wanted
    ]
    if agent_says(devices, kernels, grant) == "":
        slots = {grant[0].slot: sum(share.amount for share in grant)}
        check_grant(slots, "", devices, sorted(grant, key=lambda share: -share.amount))
        check_books(devices, [*kernels, Grant("n", {}, tuple(grant))])
        # What it takes, the manager could have placed: perhaps elsewhere.
        assert not isinstance(fit(slots, "", devices, kernels), str)


@settings(max_examples=150, deadline=None)
@given(nodes(), st.sampled_from([1500, 1010, 2000, 2500, 3000]))
def test_several_devices_are_those_that_are_connected_best(
    devices: list[DeviceCapacity], wanted: int
) -> None:
    result = fit({SHARES: wanted}, "", devices, [])
    if isinstance(result, str):
        return
    able = [
        device.id for device in devices if agent_says(devices, [], [DeviceShare(device.id, SHARES, 10)]) == ""
    ]
    able = [name for name in able if "-" not in name]
    table = {device.id: device.distances for device in devices}

    def ways(names: Sequence[str]) -> int:
        return sum(table[one].get(other, 50) for one, other in combinations(names, 2))

    best = min(ways(names) for names in combinations(able, len(result)))
    assert ways([share.device for share in result]) == best


def linked(groups: int, size: int) -> list[DeviceCapacity]:
    """GPUs in groups joined by NVLink, interleaved; of others nobody knows."""
    names = [f"g{index:02}" for index in range(groups * size)]
    return [
        gpu(name, distances={other: 0 for other in names[index % groups :: groups] if other != name})
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize(("groups", "size"), [(2, 2), (2, 4), (4, 8), (3, 16)])
@pytest.mark.parametrize("slot", [SHARES, DEVICES])
def test_a_group_is_found_among_few_and_among_many(groups: int, size: int, slot: str) -> None:
    devices = linked(groups, size)
    # The first group has one GPU less: it is no place for so many.
    first = given_out(fit({slot: size * MILLI}, "", devices, [whole("g00")]))
    assert [name for name, _ in first] == [f"g{index:02}" for index in range(1, groups * size, groups)]


def test_of_equals_the_fullest_are_taken() -> None:
    devices = [gpu("a"), gpu("b"), gpu("c")]
    grants = [held(("a", 100)), held(("c", 200))]
    assert given_out(fit({SHARES: 1500}, "", devices, grants)) == [("c", 750), ("a", 750)]
    # 2.50 are 0.834 + 0.833 + 0.833: two of them fit where 0.833 are left.
    grants = [held(("a", 167)), held(("c", 167))]
    assert given_out(fit({SHARES: 2500}, "", devices, grants)) == [("b", 834), ("a", 833), ("c", 833)]
    grants.append(held(("b", 167)))
    assert fit({SHARES: 2500}, "", devices, grants) == "cuda.shares: 2.499 free, 2.50 wanted"


def test_a_whole_gpu_first_then_the_smallest_part() -> None:
    devices = [gpu("a"), part("p2", "b", 420), part("p1", "b", 280), part("p3", "b", 140)]
    assert given_out(fit({SHARES: 250}, "", devices, [])) == [("a", 250)]
    full = [held(("a", 800))]
    assert given_out(fit({SHARES: 250}, "", devices, full)) == [("p1", 250)]
    full.append(held(("p1", 250)))
    # The rest of a part is nobody's.
    assert given_out(fit({SHARES: 100}, "", devices, [*full, held(("a", 200))])) == [("p3", 100)]
    assert given_out(fit({SHARES: 400}, enforcement.MIG, devices, [])) == [("p2", 400)]
    used = used_shares(devices, full)
    assert used == {"a": 800, "p1": 280, "p2": 0, "p3": 0}


def test_parts_are_not_joined_and_their_gpu_is_no_device() -> None:
    devices = [gpu("a"), gpu("b"), part("p1", "b", 420), part("p2", "b", 420)]
    refused = fit({SHARES: 1500}, "", devices, [])
    assert refused == "cuda.shares: 1.00 free, 1.50 wanted (parts of GPUs cannot be joined to others)"
    assert fit({DEVICES: 2000}, "", devices, []) == "cuda.device: 1 whole GPUs free, 2 wanted"
    assert [device.id for device in offered(devices, [])] == ["a", "p1", "p2"]
    # MIG mode is off again: its parts are sick, and the GPU is one again once nobody has any of them.
    off = [gpu("a"), gpu("b"), part("p1", "b", 420, healthy=False), part("p2", "b", 420, healthy=False)]
    assert len(given_out(fit({DEVICES: 2000}, "", off, []))) == 2
    assert fit({DEVICES: 2000}, "", off, [held(("p1", 100))]) == (
        "cuda.device: 1 whole GPUs free, 2 wanted (2 GPUs out of order)"
    )
    # Nor is a part one as long as somebody has the GPU.
    on = [gpu("b", healthy=False), part("p1", "b", 420)]
    assert given_out(fit({SHARES: 400}, "", on, [])) == [("p1", 400)]
    busy = [held(("b", 100))]
    assert fit({SHARES: 400}, "", on, busy) == "cuda.shares: 0.00 free, 0.40 wanted (1 GPU out of order)"
    assert "in use as a whole" in agent_says(on, busy, [DeviceShare("p1", SHARES, 400)])


def test_refusals_are_told() -> None:
    two = [gpu("a"), gpu("b")]
    assert fit({SHARES: 400}, "watchdog", two, []) == (
        "cuda.shares: 2 GPUs have room, but enforce `none`, `watchdog` is required"
    )
    mixed = [gpu("a", enforcement="hook"), gpu("b", enforcement="mps")]
    assert given_out(fit({SHARES: 400}, "mps", mixed, [])) == [("b", 400)]
    assert fit({SHARES: 400}, "mps", mixed, [held(("b", 700))]) == (
        "cuda.shares: 1 GPU has room, but enforces `hook`, `mps` is required"
    )
    assert fit({SHARES: 400}, "mps", mixed, [held(("b", 700), ("a", 700))]) == (
        "cuda.shares: 0.30 free, 0.40 wanted (1 GPU enforces less than `mps`)"
    )
    pieces = [part("p1", "a", 200), part("p2", "a", 200)]
    assert str(fit({SHARES: 400}, "", pieces, [])).startswith(
        "cuda.shares: fragmented, 0.40 free, but in pieces of 0.20 and 0.20"
    )
    sick = [gpu("a", healthy=False, detail="fell off the bus"), gpu("b")]
    assert fit({DEVICES: 2000}, "", sick, []) == (
        "cuda.device: 1 whole GPUs free, 2 wanted (1 GPU out of order: fell off the bus)"
    )
    assert "(1 GPU out of order: fell off the bus)" in str(fit({SHARES: 1500}, "", sick, []))
    assert fit({SHARES: 10}, "", [], []) == "cuda.shares: no GPU, 0.01 wanted"
    assert fit({}, "mig", [], []) == ()


def test_of_parts_it_is_told_whether_they_are_taken_or_too_small() -> None:
    devices = [gpu("a"), part("p1", "b", 420), part("p2", "b", 280)]
    refused = "{}, {} wanted, `mig` is required"

    def told(wanted: int, *grants: Grant) -> object:
        return fit({SHARES: wanted}, enforcement.MIG, devices, grants)

    largest = "cuda.shares: the largest part of a GPU in MIG mode is 0.42"
    assert told(500) == refused.format(largest, "0.50")
    assert told(500, held(("p1", 100)), held(("p2", 100))) == refused.format(largest, "0.50")
    free = "cuda.shares: the largest free part of a GPU in MIG mode is 0.28"
    assert told(400, held(("p1", 100))) == refused.format(free, "0.40")
    taken = "cuda.shares: all 2 parts of GPUs in MIG mode are taken"
    assert told(200, held(("p1", 100)), held(("p2", 100))) == refused.format(taken, "0.20")
    one = [gpu("a"), part("p1", "b", 420)]
    assert "the only part of a GPU in MIG mode is taken" in str(
        fit({SHARES: 100}, enforcement.MIG, one, [held(("p1", 10))])
    )
    assert "enforce `none`, `mig` is required" in str(
        fit({SHARES: 100}, enforcement.MIG, [gpu("a"), gpu("b")], [])
    )
