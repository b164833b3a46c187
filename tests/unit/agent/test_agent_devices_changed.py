"""What a look at the accelerators changes: what drivers tell, and what the agent makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.agent import device_changes
from dure.agent.accelerators import Found, device
from dure.agent.device_changes import DEVICE_LOST, changes, doomed, remembered
from dure.agent.nvml import gpus
from dure.fleet.v1 import fleet_pb2

GIB = 2**30


def gpu(
    uid: str, index: int, error: str = "", lost: bool = False, parts: int | None = None
) -> dict[str, Any]:
    """A GPU in the worker's words; one that does not answer has forgotten all but its place."""
    made = [
        {
            "id": f"MIG-{uid}-{part}",
            "model": "part",
            "memory_bytes": 10 * GIB,
            "slices": 1,
            "memory": {},
            "mps": [],
        }
        for part in range(parts or 0)
    ]
    return {
        "index": index, "id": uid, "model": "H100", "memory_bytes": 80 * GIB, "numa": None,
        "mig": parts is not None, "slices_max": 7, "parts": made, "memory": {}, "mps": [], "peers": {},
        "error": error, "lost": lost,
    }  # fmt: skip


def told(*found: dict[str, Any], error: str = "") -> dict[str, Any]:
    return {"error": error, "gpus": list(found)}


def standing(look: gpus.Look) -> dict[str, bool]:
    return {one.id: one.healthy for one in look.found.devices}


def test_a_gpu_that_forgot_who_it_is_is_known_by_its_place() -> None:
    first = gpus.look(told(gpu("a", 0), gpu("b", 1)), {})
    second = gpus.look(told(gpu("", 0, "GPU is lost", lost=True), gpu("b", 1)), first.known)
    assert standing(second) == {"a": False, "b": True} and second.found.lost == {"a"}
    assert not second.found.limitations
    third = gpus.look(told(gpu("a", 0), gpu("b", 1)), second.known)
    assert standing(third) == {"a": True, "b": True} and not third.found.lost


def test_a_gpu_that_took_anothers_place_is_not_taken_for_it() -> None:
    first = gpus.look(told(gpu("a", 0), gpu("b", 1)), {})
    # `a` is gone, and `b`, now the first, is sick.
    second = gpus.look(told(gpu("b", 0, "GPU is lost", lost=True)), first.known)
    details = {one.id: one.detail for one in second.found.devices}
    assert details == {
        "a": "the driver does not list it any more",
        "b": "the driver does not answer for it: GPU is lost",
    }
    assert second.found.lost == {"b"}


def test_one_that_is_not_listed_is_lost_at_the_second_look() -> None:
    look = gpus.look(told(gpu("a", 0), gpu("b", 1)), {})
    lost = []
    for answer in (told(gpu("b", 0)), told(error="hangs"), told(gpu("b", 0))):
        look = gpus.look(answer, look.known)
        lost.append(look.found.lost)
    # Time in which the driver says nothing at all does not count.
    assert lost == [frozenset(), frozenset(), frozenset()]
    look = gpus.look(told(gpu("b", 0)), look.known)
    assert look.found.lost == {"a"} and standing(look) == {"a": False, "b": True}


def test_parts_go_with_their_gpu() -> None:
    first = gpus.look(told(gpu("a", 0, parts=2)), {})
    assert [dict(one.slots) for one in first.found.devices] == [{"cuda.shares": 120}] * 2
    second = gpus.look(told(gpu("a", 0, "GPU is lost", lost=True)), first.known)
    assert second.found.lost == {"MIG-a-0", "MIG-a-1"}


def test_a_driver_that_fails_from_the_start_is_a_limitation() -> None:
    look = gpus.look(told(error="Driver Not Loaded"), {})
    assert look.found == Found(limitations=("no GPUs are offered: Driver Not Loaded",))
    look = gpus.look(told(gpu("", 0, "Unknown Error"), gpu("b", 1)), {})
    assert look.found.limitations == ("GPU 0 cannot be used: Unknown Error",)
    assert standing(look) == {"b": True}


def test_parts_that_are_made_anew_do_not_pile_up() -> None:
    look = gpus.look(told(gpu("r0", 0, parts=7)), {})
    for number in range(1, 40):
        look = gpus.look(told(gpu(f"r{number}", 0, parts=7)), look.known)
    assert len(look.known) == 7 + gpus.GONE_MAX
    # The oldest go first.
    assert {"MIG-r39-0", "MIG-r38-0"} <= look.known.keys() and "MIG-r1-0" not in look.known


@pytest.mark.parametrize(
    ("slices", "memory_gib", "shares"),
    [(7, 80, 1000), (3, 40, 420), (1, 10, 120), (1, 20, 140), (2, 20, 250), (1, 0, 10), (9, 99, 1000)],
)
def test_a_part_is_worth_its_slices_and_not_more_than_its_memory(
    slices: int, memory_gib: int, shares: int
) -> None:
    assert gpus.part_shares_milli(slices, 7, memory_gib * GIB, 80 * GIB) == shares


ANSWERS = st.lists(
    st.one_of(
        st.just(told(error="hangs")),
        st.lists(
            st.tuples(st.sampled_from("abcd"), st.sampled_from(["", "sick", "lost"])),
            unique_by=lambda one: one[0],
            max_size=4,
        ).map(
            lambda found: told(
                *(gpu(uid, index, how, lost=how == "lost") for index, (uid, how) in enumerate(found))
            )
        ),
    ),
    max_size=12,
)


@given(ANSWERS, st.sets(st.sampled_from("abcd")))
def test_whatever_a_driver_does_devices_stay_and_only_those_that_are_gone_are_lost(
    answers: list[dict[str, Any]], held: set[str]
) -> None:
    known: Mapping[str, gpus.Known] = {}
    devices: Mapping[str, fleet_pb2.Device] = {}
    ever: set[str] = set()
    for answer in answers:
        look = gpus.look(answer, known)
        known = look.known
        after = changes(devices, look.found, held, {})
        devices = after.devices
        well = {one["id"] for one in answer["gpus"] if not one["error"]}
        ever |= well
        assert set(devices) == ever
        assert {uid for uid, one in devices.items() if one.healthy} == well
        assert all(one.healthy != bool(one.detail) for one in devices.values())
        listed_sick = {one["id"] for one in answer["gpus"] if one["error"] == "sick"}
        assert not after.lost.keys() & (well | listed_sick)
        assert {one["id"] for one in answer["gpus"] if one["lost"]} & ever <= after.lost.keys()
        if answer["error"]:
            assert not after.lost


def kernel(uid: str, *held: str) -> fleet_pb2.KernelSpec:
    grants = [fleet_pb2.DeviceGrant(device=one, slot="cuda.shares", amount=500) for one in held]
    return fleet_pb2.KernelSpec(uid=uid, devices=grants)


def test_kernels_of_a_lost_device_end_and_no_others() -> None:
    found = Found((device("a", "H100", GIB, "cuda"), device("b", "H100", GIB, "cuda")), lost=frozenset("a"))
    found.devices[0].healthy, found.devices[0].detail = False, "GPU is lost"
    after = changes({}, found, (), {})
    ends = doomed([kernel("k1", "a"), kernel("k2", "b"), kernel("k3"), kernel("k4", "b", "a")], after.lost)
    assert ends.keys() == {"k1", "k4"}
    assert (ends["k1"].reason, ends["k1"].code) == (DEVICE_LOST, -1)
    assert ends["k1"].message == "device a (H100) is lost: GPU is lost"
    assert after.troubles == ("device a (H100) cannot be used: GPU is lost",)
    again = changes(after.devices, found, (), {})
    # Said once, meant as long as it is so: a kernel that resists is ended again.
    assert not again.troubles and again.lost == after.lost
    back = Found((device("a", "H100", GIB, "cuda"),))
    last = changes(after.devices, back, {"b"}, {})
    assert last.recoveries == ("device a (H100) is back",)
    assert last.devices["b"].detail == device_changes.NOT_FOUND and not last.lost
    assert "b" not in changes(after.devices, back, (), {}).devices


def test_what_cannot_be_given_to_kernels_is_not_healthy_and_says_why() -> None:
    found = Found((device("a", "H100", GIB, "cuda"), device("s", "sim", GIB, "simulated")))
    after = changes({}, found, (), {"cuda": "the engine has no NVIDIA runtime"})
    assert not after.devices["a"].healthy and after.devices["s"].healthy
    assert after.devices["a"].detail == "the engine has no NVIDIA runtime"
    # What the plug-in keeps is left as it was.
    assert found.devices[0].healthy


def test_what_others_found_out_of_a_device_stays() -> None:
    found = Found((device("a", "H100", GIB, "cuda"),))
    before = changes({}, found, (), {}).devices
    before["a"].enforcement = "watchdog"
    assert changes(before, found, (), {}).devices["a"].enforcement == "watchdog"


def test_an_agent_remembers_what_kernels_have_and_nothing_else() -> None:
    kept = remembered([device("a", "H100", GIB, "cuda"), device("b", "H100", GIB, "cuda")], {"a"})
    assert list(kept) == ["a"] and kept["a"].detail == device_changes.NOT_SEEN_YET
    # A driver that hangs from the start says nothing against a kernel that runs.
    known = {uid: gpus.Known(one, gpus.NO_INDEX) for uid, one in kept.items()}
    look = gpus.look(told(error="hangs"), known)
    assert standing(look) == {"a": False} and not look.found.lost
    look = gpus.look(told(gpu("a", 3)), look.known)
    assert standing(look) == {"a": True}
