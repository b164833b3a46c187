"""What to do about an endpoint that finds no place: the advice fits what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from dure.manager.advising import Obstacle, advice, ways
from dure.manager.devices import DeviceCapacity
from dure.manager.model import DeviceShare, Grant
from dure.manager.placement import Node, Request, place
from dure.wire.quantities import CPU, DEVICES, MEM, MILLI, SHARES

GPU = {SHARES: MILLI, DEVICES: MILLI}
PLAIN = {CPU: 1_000, MEM: 2**30 * 1000}
X = Obstacle


def node(name: str = "a", gpus: int = 2, **fields: object) -> Node:
    devices = [DeviceCapacity(f"{name}{index}", GPU, enforcement="watchdog") for index in range(gpus)]
    made = Node(name, name, "default", {CPU: 4_000, MEM: 2**33 * 1000}, devices, architecture="x86_64")
    return replace(made, **fields)  # type: ignore[arg-type]


def wants(slots: Mapping[str, int] | None = None, **fields: object) -> Request:
    return replace(Request({**PLAIN, **(slots or {})}, "default"), **fields)  # type: ignore[arg-type]


def full(name: str = "a", gpus: int = 2) -> Grant:
    return Grant(name, {CPU: 500}, tuple(DeviceShare(f"{name}{i}", SHARES, 900) for i in range(gpus)))


def found(request: Request, one: Node) -> list[set[Obstacle]]:
    return [set(way) for way in ways(request, one, one.grants)]


def test_each_obstacle_is_found() -> None:
    half = wants({SHARES: 500})
    assert found(half, node()) == []
    assert found(half, node(grants=[full()])) == [{X.ROOM}]
    assert found(half, node(available=False)) == [{X.AWAY}]
    assert found(wants(has_image=False), node(runs_images=True)) == [{X.NO_IMAGE}]
    assert found(wants(needs_image=True), node()) == [{X.NO_COMMAND}]
    assert found(wants(architecture="aarch64"), node()) == [{X.ARCHITECTURE}]
    assert found(wants(strict="the endpoint"), node()) == [{X.PROFILE}]
    assert found(wants(needs_mounts=True), node(maps_mounts=False)) == [{X.VIEW}]
    assert found(wants({SHARES: 500}, enforcement="mps"), node()) == [{X.ENFORCEMENT}]
    assert found(wants(fixed_port=8000), node(grants=[Grant("a", {}, (), 8000)])) == [{X.PORT}]
    sick = node(devices=[DeviceCapacity("a0", GPU, healthy=False)])
    assert found(half, sick) == [{X.SICK}]
    assert found(wants({DEVICES: 3_000}), node()) == [{X.SIZE}]
    assert found(wants({SHARES: 500}, enforcement="mps"), node(available=False)) == [{X.AWAY, X.ENFORCEMENT}]
    # One thing or the other.
    either = node(gpus=1, devices=[DeviceCapacity("a0", GPU), DeviceCapacity("a1", GPU, healthy=False)])
    assert found(half, replace(either, grants=[full(gpus=1)])) == [{X.SICK}, {X.ROOM}]


def test_advice_fits_what_stands_in_the_way() -> None:
    said = advice("e", wants(has_image=False), [node(runs_images=True)])
    assert said == ["give it an image: dure endpoint update e --image IMAGE"]
    said = advice("e", wants({SHARES: 500}, enforcement="mps"), [node()])
    assert said[0] == "require less: dure endpoint update e --require-enforcement watchdog"
    said = advice("e", wants(strict="the endpoint"), [node()])
    assert said[0].startswith("ask for less: dure endpoint update e --profile default")
    said = advice("e", wants(strict="the resource group `g`"), [node()])
    assert said == ["choose a group whose agents run images: dure endpoint update e --group NAME"]
    sick = node(devices=[DeviceCapacity("a0", GPU, healthy=False)])
    assert advice("e", wants({SHARES: 500}), [sick]) == [
        "mend the GPUs that are out of order: dure agent get a"
    ]
    assert advice("e", wants(), [node(available=False)])[0].startswith("bring back a: start its agent again")
    assert advice("e", wants({SHARES: 500}), [node(grants=[full()])])[0].startswith("ask for less: dure")
    assert "has no agents" in advice("e", wants(), [])[0]
    assert advice("e", wants(), [node("a", available=False), node("b")]) == []


def test_of_an_impossible_wish_it_is_said_what_the_largest_node_has() -> None:
    small, large = node("small", gpus=1), node("large")
    # A group that is full does not hide that it would never do.
    busy = replace(large, grants=[full("large")])
    said = advice("e", wants({DEVICES: 3_000}), [small, busy])
    assert said[0] == "ask for less cuda.device: the largest node, large, has 2"
    assert "dure endpoint update e -r SLOT=AMOUNT" in said[1]
    assert advice("e", wants({CPU: 64_000}), [small])[0] == "ask for less cpu: the largest node, small, has 4"
    assert advice("e", wants({MEM: 2**40 * 1000}), [small])[0].endswith("small, has 8 GiB")
    parts = node(devices=[DeviceCapacity(f"p{i}", {SHARES: 420}, parent="x") for i in range(2)])
    said = advice("e", wants({SHARES: 500}), [parts])
    assert said[0] == "ask for less cuda.shares: the largest node, a, has 0.84 in parts of at most 0.42"
    assert advice("e", wants({SHARES: 500}), [node(gpus=0)])[0].startswith("no node of `default` has GPUs")
    apart = [node("gpus", slots={CPU: 500, MEM: 2**33 * 1000}), node("cores", gpus=0)]
    assert advice("e", wants({SHARES: 500}), apart)[0].startswith("ask for less: no node has all of this")


flags = st.booleans()


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([{}, {SHARES: 500}, {SHARES: 1500}, {DEVICES: 1_000}, {DEVICES: 3_000}, {CPU: 9_000}]),
    st.lists(st.tuples(flags, flags, flags, flags, flags, st.integers(0, 2)), min_size=1, max_size=4),
    st.sampled_from(["", "mps"]),
    st.sampled_from(["", "the endpoint"]),
    flags,
)
def test_there_is_advice_where_and_only_where_there_is_no_place(
    slots: Mapping[str, int],
    kinds: list[tuple[bool, bool, bool, bool, bool, int]],
    least: str,
    strict: str,
    has_image: bool,
) -> None:
    request = wants(slots, enforcement=least, strict=strict, has_image=has_image)
    nodes = []
    for index, (available, images, busy, healthy, able, gpus) in enumerate(kinds):
        name = f"n{index}"
        made = node(name, gpus, available=available, runs_images=images, runs_strict=able)
        made = replace(made, devices=[replace(device, healthy=healthy) for device in made.devices])
        nodes.append(replace(made, grants=[full(name, gpus)] if busy else []))
    said = advice("e", request, nodes)
    assert bool(said) == (not hasattr(place(request, nodes), "kernels"))
    assert len(said) == len(set(said))
