"""The decisions of enforcement: which mode, what is shown of it, who must go, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.agent.enforcement import MIB, CannotHold, Held, Part, Seen, mebibytes, percent
from dure.agent.enforcement.choice import (
    AUTO,
    NOT_USED_YET,
    OPTIONS,
    Choice,
    Standing,
    below,
    candidates,
    choose,
    lacking_since,
    resolve,
    shortfall,
    standing,
    weakest,
)
from dure.agent.enforcement.hook import is_library, mapped
from dure.agent.enforcement.mig import Mig
from dure.agent.enforcement.mps import DEATHS_MAX, DEATHS_WITHIN_S, may_start
from dure.agent.enforcement.watchdog import LOOKS, Watchdog, excesses, strikes
from dure.wire.enforcement import HOOK, MIG, MODES, MPS, NONE, WATCHDOG, rank

GIB = 2**30
ANY_MODE = st.sampled_from(MODES)
BYTES = st.integers(0, 100 * GIB)
DEVICES = st.sampled_from(["gpu-0", "gpu-1", "gpu-2"])


def test_the_order_is_that_of_what_a_mode_keeps() -> None:
    assert MODES == (NONE, WATCHDOG, HOOK, MPS, MIG)
    assert rank("") == rank("nonsense") == rank(NONE)


@pytest.mark.parametrize(
    ("option", "has_library", "is_part", "tried"),
    [
        (AUTO, False, False, (WATCHDOG, NONE)),
        (AUTO, True, False, (HOOK, WATCHDOG, NONE)),
        (MPS, False, False, (MPS, WATCHDOG, NONE)),
        (MPS, True, False, (MPS, HOOK, WATCHDOG, NONE)),
        (WATCHDOG, True, False, (WATCHDOG, NONE)),
        (NONE, True, False, (NONE,)),
        (MPS, True, True, (MIG, WATCHDOG, NONE)),
        (NONE, False, True, (MIG, NONE)),
    ],
)
def test_what_is_tried_for_a_device(
    option: str, has_library: bool, is_part: bool, tried: tuple[str, ...]
) -> None:
    assert candidates(resolve(option, has_library), has_library, is_part) == tried


@given(
    st.sampled_from(OPTIONS),
    st.booleans(),
    st.booleans(),
    st.dictionaries(ANY_MODE, st.sampled_from(["", "no"])),
)
def test_a_device_gets_the_best_that_works_and_every_better_one_says_why_not(
    option: str, has_library: bool, is_part: bool, problems: dict[str, str]
) -> None:
    tried = candidates(resolve(option, has_library), has_library, is_part)
    problems[NONE] = ""
    found = choose(tried, problems)
    assert not problems.get(found.mode)
    for better in tried[: tried.index(found.mode)]:
        assert problems[better] and better in found.why


@given(st.lists(ANY_MODE, min_size=1))
def test_a_kernel_has_the_weakest_mode_of_its_devices(modes: list[str]) -> None:
    found = weakest([Choice(mode) for mode in modes])
    assert all(rank(found.mode) <= rank(mode) for mode in modes)


@given(ANY_MODE, st.booleans(), st.data())
def test_nothing_is_shown_that_is_not_certain(prepared: str, watched: bool, data: st.DataObject) -> None:
    tried = below(prepared, watched)
    assert tried[-1] == NONE
    assert all(rank(mode) <= max(rank(prepared), rank(WATCHDOG)) for mode in tried)
    answers = [
        (mode, "" if mode == NONE else data.draw(st.sampled_from(["", "it is not", NOT_USED_YET])))
        for mode in tried
    ]
    found = standing(answers)
    assert dict(answers)[found.mode] == ""
    for mode, problem in answers:
        if rank(mode) > rank(found.mode):
            assert problem and f"{mode}: {problem}" in found.detail
    assert found.pending == any(
        problem == NOT_USED_YET for mode, problem in answers if rank(mode) > rank(found.mode)
    )


def test_patience_counts_only_what_can_be_told() -> None:
    short, pending, fine = (
        Standing(WATCHDOG, "", False),
        Standing(WATCHDOG, "", True),
        Standing(HOOK, "", False),
    )
    assert lacking_since(HOOK, fine, True, 1.0, 5.0) is None
    assert lacking_since("", Standing(NONE, "", False), True, None, 5.0) is None
    assert lacking_since(HOOK, short, True, None, 5.0) == 5.0
    assert lacking_since(HOOK, short, True, 5.0, 9.0) == 5.0
    assert lacking_since(HOOK, pending, True, None, 5.0) is None
    # A driver that hangs stops the clock, and lets it begin anew.
    assert lacking_since(HOOK, short, False, 5.0, 9.0) == 9.0
    assert lacking_since(HOOK, short, False, None, 9.0) is None
    assert "`hook`" in shortfall(HOOK, WATCHDOG, "why") and "(why)" in shortfall(HOOK, WATCHDOG, "why")


@given(
    st.dictionaries(DEVICES, st.integers(10, 1000)),
    st.dictionaries(DEVICES, st.dictionaries(st.integers(1, 9), BYTES)),
    st.integers(0, GIB),
)
def test_who_holds_too_much(
    shares: dict[str, int], used: dict[str, dict[int, int]], allowance_bytes: int
) -> None:
    parts = tuple(Part(device, share, 80 * GIB) for device, share in shares.items())
    found = {excess.device for excess in excesses(parts, used, allowance_bytes)}
    for device, by_pid in used.items():
        share = shares.get(device)
        allowed = 80 * GIB * share // 1000 + allowance_bytes if share else 0
        assert (device in found) == (sum(by_pid.values()) > allowed)
    assert found <= used.keys()


@given(st.lists(st.sampled_from(["over", "within", "silent"]), max_size=12))
def test_only_looks_in_a_row_count(looks: list[str]) -> None:
    part = Part("gpu-0", 500, 80 * GIB)
    held = Held("k", (part,), Path("k"))
    watchdog, run = Watchdog(512), 0
    for look in looks:
        memory = {"over": {1: 50 * GIB}, "within": {1: 40 * GIB}}.get(look)
        seen = Seen(frozenset({1}), {} if memory is None else {"gpu-0": memory})
        ended = watchdog.watch(held, seen)
        run = {"over": run + 1, "within": 0, "silent": run}[look]
        assert (ended is not None) == (look == "over" and run >= LOOKS)
        if ended is not None:
            assert ended.reason == "GPU_MEMORY_EXCEEDED"
            assert "its share of 0.5 is 40 GiB" in ended.message


def test_a_kernel_that_is_gone_leaves_no_strikes() -> None:
    held, watchdog = Held("k", (), Path("k")), Watchdog()
    seen = Seen(frozenset({1}), {"gpu-0": {1: 1}})
    assert watchdog.watch(held, seen) is None
    watchdog.forget(frozenset())
    assert watchdog.watch(held, seen) is None
    ended = watchdog.watch(held, seen)
    assert ended is not None
    assert "which it was not granted" in ended.message
    assert strikes({"a": 1}, [], {"a": {}}) == {}


def test_a_part_is_told_as_percent_and_mebibytes() -> None:
    assert (percent(Part("g", 333, GIB)), percent(Part("g", 5, GIB)), percent(Part("g", 1000, GIB))) == (
        33,
        1,
        100,
    )
    assert mebibytes(Part("g", 250, 80 * GIB)) == 20480
    # A part of a GPU is granted as a whole, whatever its share of the GPU is.
    assert mebibytes(Part("m", 420, 40 * GIB, "g")) == 40960
    with pytest.raises(CannotHold, match="less than 1 MiB"):
        mebibytes(Part("g", 10, 99 * MIB))


def test_mig_is_not_in_force_for_who_uses_another_device() -> None:
    held = Held("k", (Part("mig-1", 420, GIB, "gpu-0"),), Path("k"))
    assert Mig().verify(held, Seen(frozenset({1}), {"mig-1": {1: 5}, "gpu-1": {}})) == ""
    assert "gpu-1" in Mig().verify(held, Seen(frozenset({1}), {"mig-1": {1: 5}, "gpu-1": {1: 1}}))
    assert Mig().verify(Held("k", (Part("gpu-0", 420, GIB),), Path("k")), Seen(frozenset(), {})) != ""


@given(st.lists(st.floats(0, 10_000), max_size=20), st.floats(0, 20_000))
def test_a_daemon_is_not_started_too_often(deaths_s: list[float], now_s: float) -> None:
    recent = [death_s for death_s in deaths_s if death_s > now_s - DEATHS_WITHIN_S]
    assert may_start(deaths_s, now_s) == (len(recent) < DEATHS_MAX)


def test_a_library_is_known_by_its_identity_not_by_its_name() -> None:
    maps = (
        "7f0000000000-7f0000001000 r-xp 00000000 fe:01 4242           /usr/local/vgpu/libvgpu.so\n"
        "7f0000002000-7f0000003000 rw-p 00000000 00:00 0 \n"
        "7ffc00000000-7ffc00001000 r-xp 00000000 00:00 0                          [vdso]\n"
    )
    assert list(mapped(maps, [424, 42421])) == []
    (file,) = mapped(maps, [7, 4242])
    device = os.makedev(0xFE, 1)
    assert is_library(file, device, 4242, frozenset())
    assert not is_library(file, device, 4243, frozenset({"/usr/local/vgpu/libvgpu.so"}))
    # Another number of the device than stat's is believed at the right place only.
    assert not is_library(file, 7, 4242, frozenset({"/elsewhere/libvgpu.so"}))
    assert is_library(file, 7, 4242, frozenset({"/usr/local/vgpu/libvgpu.so"}))
