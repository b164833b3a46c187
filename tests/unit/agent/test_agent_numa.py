"""What keeps kernels near their GPUs: the notation of the kernel, and who is pinned where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.agent import machine, numa
from dure.agent.numa import Node, Pin
from dure.fleet.v1 import fleet_pb2

GIB = 2**30
NODES = {
    0: Node(frozenset({0, 1, 2, 3, 8, 9}), 64 * GIB),
    1: Node(frozenset({4, 5}), 8 * GIB),
    2: Node(frozenset({6}), 0),
}


def gpu(node: int | None) -> fleet_pb2.Device:
    return fleet_pb2.Device(id="GPU", numa_node=node) if node is not None else fleet_pb2.Device(id="GPU")


@pytest.mark.parametrize(
    ("near", "cpu_milli", "memory_bytes", "expected"),
    [
        ([0], 6000, 64 * GIB, Pin("0-3,8-9", "0")),
        ([0, 0], 1000, GIB, Pin("0-3,8-9", "0")),
        # It would get fewer cores than it was granted.
        ([0], 6001, GIB, Pin()),
        # Less memory than it was granted: it may take that from elsewhere.
        ([1], 2000, 9 * GIB, Pin("4-5", "")),
        ([2], 1000, 0, Pin("6", "")),
        ([0, 1], 1000, GIB, Pin()),
        ([0, None], 1000, GIB, Pin()),
        ([None], 1000, GIB, Pin()),
        ([7], 1000, GIB, Pin()),
        ([], 1000, GIB, Pin()),
    ],
)
def test_a_kernel_is_pinned_where_it_keeps_what_it_was_granted(
    near: list[int | None], cpu_milli: int, memory_bytes: int, expected: Pin
) -> None:
    assert numa.pin([gpu(node) for node in near], cpu_milli, memory_bytes, NODES) == expected
    assert numa.pin([gpu(node) for node in near], cpu_milli, memory_bytes, {}) == Pin()


@given(st.sets(st.integers(0, 300)))
def test_the_kernels_notation_is_read_and_written(numbers: set[int]) -> None:
    assert numa.listed(numa.written(numbers)) == numbers


@pytest.mark.parametrize("text", ["3-1", "x", "1-", "-1", "0-99999999999", "1;2"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        numa.listed(text)


def test_a_machine_tells_its_nodes(tmp_path: Path) -> None:
    own = numa.written(os.sched_getaffinity(0))
    status = tmp_path / "status"
    status.write_text("Name:\tx\nMems_allowed_list:\t0\n")
    for name, cpus in (("node0", own), ("node1", "60000-60003"), ("node2", ""), ("node3", own)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(f"{cpus}\n")
        (tmp_path / name / "meminfo").write_text(
            f"Node {name[4:]} MemTotal:  1024 kB\nNode 0 MemFree: 1 kB\n"
        )
    (tmp_path / "nodes").mkdir()
    found = machine.numa_nodes(str(tmp_path), str(status))
    # Cores that the agent may not use, and a node without any (a GPU's own memory), are none to pin to.
    assert found == {
        0: Node(frozenset(os.sched_getaffinity(0)), 2**20),
        3: Node(frozenset(os.sched_getaffinity(0)), 0),
    }
    assert machine.numa_nodes(str(tmp_path / "nodes"), str(status)) == {}
