"""Two looks at a kernel, and what its devices say, as the numbers that rules name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.agent.usage import DeviceUse, Grant, Usage, device_values, values

GIB = 2**30


def test_two_looks_make_rates_and_shares_of_the_grant() -> None:
    before = Usage(10.0, 5.0, GIB, 1000, 2000, 10, 20)
    now = Usage(12.0, 6.0, GIB // 2, 1000, 6000, 30, 60)
    assert values(before, now, 2000, 2 * GIB) == {
        "cpu_used": 0.5,
        "cpu_util": 25.0,
        "mem": GIB / 2,
        "mem_util": 25.0,
        "disk_read": 0.0,
        "disk_write": 2000.0,
        "net_rx": 10.0,
        "net_tx": 20.0,
    }


def test_the_first_look_gives_no_rates() -> None:
    assert values(None, Usage(1.0, 5.0, 100), 1000, 200) == {"mem": 100.0, "mem_util": 50.0}


def test_what_cannot_be_told_is_left_out() -> None:
    assert values(Usage(1.0), Usage(2.0), 1000, 1000) == {}
    # Nothing was granted that it could be a share of.
    assert values(Usage(1.0, 1.0, 5), Usage(2.0, 2.0, 5), 0, 0) == {"cpu_used": 1.0, "mem": 5.0}


def test_a_counter_that_went_back_gives_no_rate_once() -> None:
    first, reset, after = Usage(1.0, 9.0, 1, 50), Usage(2.0, 1.0, 1, 20), Usage(3.0, 1.5, 1, 30)
    assert "cpu_used" not in values(first, reset, 1000, 0)
    assert "disk_read" not in values(first, reset, 1000, 0)
    assert values(reset, after, 1000, 0)["cpu_used"] == 0.5
    assert values(reset, after, 1000, 0)["disk_read"] == 10.0


def test_looks_at_the_same_moment_give_no_rate() -> None:
    assert "cpu_used" not in values(Usage(1.0, 1.0), Usage(1.0, 2.0), 1000, 0)


_count = st.none() | st.integers(0, 2**50)
_look = st.builds(
    Usage, st.floats(0, 1e6), st.none() | st.floats(0, 1e9), _count, _count, _count, _count, _count
)


@given(st.none() | _look, _look, st.integers(0, 10**6), st.integers(0, 2**45))
def test_nothing_is_ever_negative(before: Usage | None, now: Usage, cpu_milli: int, memory: int) -> None:
    assert all(value >= 0 for value in values(before, now, cpu_milli, memory).values())


def test_devices_are_attributed_by_pids() -> None:
    grants = [Grant("GPU-1", 500, 80 * GIB), Grant("GPU-2", 500, 80 * GIB)]
    uses = {
        "GPU-1": DeviceUse({10: 30.0, 11: 10.0, 99: 60.0}, {10: 20 * GIB, 99: 50 * GIB}),
        "GPU-2": DeviceUse({11: 20.0}, {11: 20 * GIB}),
    }
    # 60 percent points of two halves: 60% of the one whole that was granted.
    assert device_values(grants, uses, {10, 11}) == {
        "cuda_util": pytest.approx(60.0),
        "cuda_mem": 40.0 * GIB,
        "cuda_mem_util": pytest.approx(50.0),
    }


def test_a_device_that_does_not_tell_leaves_its_numbers_out() -> None:
    grants = [Grant("GPU-1", 1000, 80 * GIB), Grant("GPU-2", 1000, 80 * GIB)]
    assert device_values(grants, {"GPU-1": DeviceUse({1: 5.0}, {1: 5})}, {1}) == {}
    uses = {"GPU-1": DeviceUse(None, {1: GIB}), "GPU-2": DeviceUse({1: 5.0}, {})}
    assert device_values(grants, uses, {1}) == {"cuda_mem": GIB, "cuda_mem_util": 100 / 160}
    assert device_values([], uses, {1}) == {}


def test_a_part_of_a_gpu_is_granted_as_a_whole() -> None:
    uses = {"MIG-1": DeviceUse(None, {7: 5 * GIB})}
    grants = [Grant("MIG-1", 100, 10 * GIB, is_whole=True)]
    assert device_values(grants, uses, {7}) == {"cuda_mem": 5 * GIB, "cuda_mem_util": 50}
