"""What keeps tests apart that run side by side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import own_ports
import pytest

TESTS = Path(__file__).parents[1]
OTHER = "import own_ports; print(own_ports.option(own_ports.sessions()), own_ports.free_port())"


def test_other_processes_never_have_the_same() -> None:
    with own_ports.row(120) as mine:
        rows = [mine, own_ports.sessions()]
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", OTHER], cwd=TESTS, capture_output=True, text=True, check=True
            )
            sessions, port = done.stdout.split()
            first, last = map(int, sessions.split("-"))
            for row in rows:
                assert not set(row) & {*range(first, last + 1), int(port)}
        assert len(mine) == 120
    with own_ports.row(120) as again:
        assert not set(again) & set(own_ports.sessions())


def test_free_ports_come_again_last() -> None:
    first = own_ports.free_ports(3)
    assert len({*first, *own_ports.free_ports(3)}) == 6
    with pytest.raises(AssertionError):
        own_ports.free_ports(1000)


def test_a_literal_port_is_one_tests_at_a_time() -> None:
    with own_ports.literal(1), pytest.raises(AssertionError), own_ports.literal(1, limit_s=0):
        pass
    with own_ports.literal(1, limit_s=0):
        pass
