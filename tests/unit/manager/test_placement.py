"""Placement: never over-committed, granted equals requested, at most one share never split."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dure.manager.devices import DeviceCapacity, portions
from dure.manager.model import DeviceShare, Grant
from dure.manager.placement import Node, NoPlace, Placed, Request, explain, fuller, place
from dure.wire.quantities import CPU, DEVICES, MEM, MILLI, SHARES

GPU = {SHARES: MILLI, DEVICES: MILLI}


def node(name: str, gpus: int = 2, cpu: int = 8_000, grants: tuple[Grant, ...] = ()) -> Node:
    devices = [DeviceCapacity(f"{name}-gpu{index}", GPU) for index in range(gpus)]
    return Node(name, name, "default", {CPU: cpu, MEM: 64_000}, devices, grants)


def held(name: str, *shares: tuple[str, int]) -> Grant:
    return Grant(name, {}, tuple(DeviceShare(f"{name}-{gpu}", SHARES, amount) for gpu, amount in shares))


amounts = (
    st.fixed_dictionaries({CPU: st.integers(1, 40).map(lambda n: n * 100), MEM: st.integers(1, 30_000)})
    | st.builds(
        lambda cpu, shares: {CPU: cpu, MEM: 1, SHARES: shares * 10},
        st.integers(1, 2_000),
        st.integers(1, 260),
    )
    | st.builds(lambda count: {CPU: 1, MEM: 1, DEVICES: count * MILLI}, st.integers(1, 4))
)


@given(st.lists(st.tuples(amounts, st.booleans()), max_size=60), st.integers(1, 3))
def test_any_sequence_of_grants_and_ends_keeps_the_books(steps: list, count: int) -> None:
    nodes = {f"n{index}": node(f"n{index}", gpus=3) for index in range(count)}
    given_out: list[tuple[Grant, str]] = []
    for slots, ends_one in steps:
        placed = place(Request(slots, "default"), nodes.values())
        if isinstance(placed, Placed):
            grant, name = placed.kernels[0].grant, placed.kernels[0].node.name
            given_out.append((grant, name))
            nodes[name] = replace(nodes[name], grants=(*nodes[name].grants, grant))
            assert grant.slots == {slot: slots[slot] for slot in (CPU, MEM)}
            wanted = slots.get(SHARES) or slots.get(DEVICES) or 0
            assert sum(share.amount for share in grant.devices) == wanted
            assert len({share.device for share in grant.devices}) == len(grant.devices)
            if 0 < slots.get(SHARES, 0) <= MILLI:
                assert len(grant.devices) == 1
        else:
            assert len(placed.refusals) == count
            assert all(refusal.reason for refusal in placed.refusals)
        if ends_one and given_out:
            grant, name = given_out.pop(0)
            left = list(nodes[name].grants)
            left.remove(grant)
            nodes[name] = replace(nodes[name], grants=tuple(left))
        check_books(nodes.values())


def check_books(nodes) -> None:
    for each in nodes:
        for slot in (CPU, MEM):
            assert sum(grant.slots.get(slot, 0) for grant in each.grants) <= each.slots[slot]
        for device in each.devices:
            parts = [s for grant in each.grants for s in grant.devices if s.device == device.id]
            whole = [part for part in parts if part.slot == DEVICES]
            assert sum(part.amount for part in parts) <= MILLI
            assert not whole or len(parts) == 1


@given(st.integers(1, 100_000))
def test_portions_are_equal_and_exact(shares: int) -> None:
    parts = portions(shares)
    assert sum(parts) == shares
    assert max(parts) - min(parts) <= 1
    assert len(parts) == -(-shares // MILLI)


def test_portions_of_the_decisions() -> None:
    assert portions(1500) == [750, 750]
    assert portions(2500) == [834, 833, 833]


def test_fragmented_shares_are_said_to_be() -> None:
    busy = node("n", grants=(held("n", ("gpu0", 800)), held("n", ("gpu1", 800))))
    result = place(Request({CPU: 1, MEM: 1, SHARES: 400}, "default"), [busy])
    assert isinstance(result, NoPlace)
    assert "fragmented" in result.refusals[0].reason
    assert "0.40 free, but in pieces of 0.20 and 0.20" in result.refusals[0].reason


def test_best_fit_keeps_whole_gpus_free() -> None:
    busy = node("n", grants=(held("n", ("gpu1", 300)),))
    result = place(Request({CPU: 1, MEM: 1, SHARES: 500}, "default"), [busy])
    assert isinstance(result, Placed)
    assert result.kernels[0].grant.devices[0].device == "n-gpu1"


def test_replicas_of_an_endpoint_are_spread() -> None:
    nodes = [node("a"), node("b")]
    result = place(Request({CPU: 1, MEM: 1}, "default", peers={"a": 1}), nodes)
    assert isinstance(result, Placed)
    assert places(result) == ["b"]


def test_a_fixed_port_is_a_resource_of_the_host() -> None:
    first = replace(node("a", grants=(Grant("a", {}, (), 8000),)), host_id="h")
    second = replace(node("b"), host_id="h")
    result = place(Request({CPU: 1, MEM: 1}, "default", fixed_port=8000), [first, second])
    assert isinstance(result, NoPlace)
    assert all("{port}" in refusal.reason for refusal in result.refusals)
    assert isinstance(place(Request({CPU: 1, MEM: 1}, "default", 8001), [first, second]), Placed)


def test_more_than_any_node_has() -> None:
    result = place(Request({CPU: 1, MEM: 1, SHARES: 5_000}, "default"), [node("a"), node("b", gpus=0)])
    assert isinstance(result, NoPlace)
    sentence = result.sentence(Request({}, "default"))
    assert "a: cuda.shares: 2.00 free, 5.00 wanted" in sentence
    assert "b: cuda.shares: no GPU" in sentence


def test_a_sick_device_and_a_lost_node_get_nothing() -> None:
    sick = replace(
        node("a", gpus=0), devices=[DeviceCapacity("x", GPU, healthy=False, detail="fell off the bus")]
    )
    lost = replace(node("b"), available=False, unavailable_reason="the agent is LOST")
    result = place(Request({CPU: 1, MEM: 1, SHARES: 100}, "default"), [sick, lost])
    assert isinstance(result, NoPlace)
    assert "fell off the bus" in result.refusals[0].reason
    assert result.refusals[1].reason == "the agent is LOST"


def test_enforcement_is_a_constraint_of_placement() -> None:
    plain = node("plain")
    watched = replace(
        node("watched"), devices=[DeviceCapacity("watched-gpu0", GPU, enforcement="watchdog")], grants=()
    )
    wanted = Request({CPU: 1, MEM: 1, SHARES: 400}, "default", enforcement="watchdog")
    assert places(place(wanted, [plain, watched])) == ["watched"]
    result = place(wanted, [plain])
    assert isinstance(result, NoPlace)
    assert result.refusals[0].reason == (
        "cuda.shares: 2 GPUs have room, but enforce `none`, `watchdog` is required"
    )
    better = place(replace(wanted, enforcement="mps"), [watched])
    assert isinstance(better, NoPlace)


def test_a_node_is_filled_by_what_a_part_takes_away() -> None:
    """A part that is given out is gone as a whole: the node with the smaller one is the fuller then."""
    small = replace(node("a"), devices=[DeviceCapacity("a-p", {SHARES: 280}, parent="x")])
    large = replace(node("b"), devices=[DeviceCapacity("b-p", {SHARES: 420}, parent="y")])
    assert places(place(Request({CPU: 1, MEM: 1, SHARES: 200}, "default"), [large, small])) == ["a"]


SMALL = {CPU: 1_000, MEM: 1_000}


def no_place(found: Placed | NoPlace) -> NoPlace:
    assert isinstance(found, NoPlace)
    return found


def places(result: Placed | NoPlace) -> list[str]:
    assert isinstance(result, Placed), result
    return [kernel.node.name for kernel in result.kernels]


def test_kernels_of_a_single_node_session_share_a_node_or_none() -> None:
    nodes = [node("a", cpu=2_000), node("b", cpu=3_000)]
    assert places(place(Request(SMALL, "default", size=3), nodes)) == ["b", "b", "b"]
    result = place(Request(SMALL, "default", size=4), nodes)
    assert isinstance(result, NoPlace)
    assert "no node has room for its 4 kernels" in result.sentence(Request(SMALL, "default", size=4))
    assert "after 2 of 4 kernels" in result.refusals[0].reason


def test_kernels_of_a_multi_node_session_go_to_different_nodes_while_they_can() -> None:
    nodes = [node("a", cpu=2_000), node("b", cpu=2_000)]
    request = Request(SMALL, "default", size=3, several_nodes=True)
    assert sorted(places(place(request, nodes))) == ["a", "a", "b"]
    request = replace(request, size=5)
    result = place(request, nodes)
    assert isinstance(result, NoPlace)
    assert "only 4 of its 5 kernels found a place" in result.sentence(request)


def test_a_session_has_a_rendezvous_port_of_its_own_on_a_host() -> None:
    first, second = replace(node("a"), host_id="h"), replace(node("b"), host_id="h")
    request = Request(SMALL, "default", size=2, salt=7)
    placed = place(request, [first, second])
    assert isinstance(placed, Placed)
    assert [kernel.grant.rendezvous_port for kernel in placed.kernels] == [30_007, 0]
    taken = replace(first, grants=tuple(kernel.grant for kernel in placed.kernels))
    again = place(request, [taken, second])
    assert isinstance(again, Placed)
    assert again.kernels[0].grant.rendezvous_port == 30_008


def test_packing_fills_the_fullest_node_that_has_room() -> None:
    nodes = [node("a"), node("b", grants=(Grant("b", SMALL),)), node("c", cpu=500)]
    request = Request(SMALL, "default", peers={"b": 3})
    assert places(place(request, nodes)) == ["a"]
    assert places(place(replace(request, pack=True), nodes)) == ["b"]


def test_what_no_free_room_would_change_is_said() -> None:
    arm = replace(node("arm"), architecture="aarch64")
    plain = replace(node("plain"), architecture="x86_64", maps_mounts=False)
    assert explain(Request(SMALL, "default", architecture="x86_64"), [arm, plain]) == [
        ("arm", "its architecture is aarch64, x86_64 is wanted"),
        ("plain", ""),
    ]
    result = dict(explain(Request(SMALL, "default", needs_image=True), [arm]))
    assert "runs no images" in result["arm"]
    images = replace(arm, runs_images=True)
    bare = Request(SMALL, "default", has_image=False)
    assert explain(bare, [images, plain]) == [
        ("arm", "it runs sessions in images, and the endpoint has none: give it one with --image"),
        ("plain", ""),
    ]
    # Of a mixed group it takes the nodes that run processes.
    assert places(place(bare, [images, plain])) == ["plain"]
    assert "the endpoint has none" in no_place(place(bare, [images])).sentence(bare)
    strict = replace(plain, name="strict", runs_strict=True)
    asked = Request(SMALL, "default", strict="the resource group `gpus`")
    assert explain(asked, [plain, strict]) == [
        (
            "plain",
            "its back end cannot do the security profile `strict`, which the resource group `gpus` asks for",
        ),
        ("strict", ""),
    ]
    result = dict(explain(Request(SMALL, "default", size=2), [arm, plain]))
    assert (result["arm"], "mount namespaces" in result["plain"]) == ("", True)


@given(st.lists(st.tuples(amounts, st.integers(1, 5), st.booleans(), st.booleans()), max_size=20))
def test_gangs_keep_the_books_and_are_whole(steps: list) -> None:
    nodes = {f"n{index}": node(f"n{index}", gpus=3) for index in range(3)}
    for slots, size, several, pack in steps:
        placed = place(Request(slots, "default", size=size, several_nodes=several, pack=pack), nodes.values())
        if isinstance(placed, Placed):
            assert len(placed.kernels) == size
            assert several or len(set(places(placed))) == 1
            for kernel in placed.kernels:
                nodes[kernel.node.name] = fuller(nodes[kernel.node.name], kernel.grant)
        check_books(nodes.values())


def test_a_port_in_a_command_is_a_containers_own() -> None:
    wanted = Request({"cpu": 100}, "default", fixed_port=8000)
    taken = (Grant("n1", {"cpu": 100}, fixed_port=8000),)
    for runs_images, several, size, fits in (
        (False, False, 1, False),
        (True, False, 1, True),
        (True, True, 1, True),
        (True, True, 2, False),
    ):
        one = replace(node("n1", gpus=0), grants=taken, runs_images=runs_images)
        request = replace(wanted, several_nodes=several, size=size)
        assert isinstance(place(request, [one]), Placed) is fits
