"""Which ports a development cluster takes."""

from __future__ import annotations

import pytest

from dure.client.dev.ports import Ports, WantedPorts, choose, choose_metrics, parse_pool
from dure.wire.errors import DureError


class Machine:
    """A machine where some ports are taken; spare ones are counted up from 15000."""

    def __init__(self, *taken: int) -> None:
        self._taken = set(taken)
        self._next = 15_000

    def taken(self, port: int) -> bool:
        return port in self._taken

    def spare(self, count: int) -> int:
        first, self._next = self._next, self._next + count
        return first


def test_defaults_on_a_free_machine() -> None:
    assert choose(WantedPorts(), {}, Machine()) == (Ports(7070, 7099, (7100, 7199)), [])


def test_defaults_that_are_taken_are_replaced_and_it_is_said() -> None:
    ports, notes = choose(WantedPorts(), {}, Machine(7070))
    assert ports == Ports(15_000, 7099, (15_001, 15_100))
    assert "port 7070 is taken" in notes[0] and "15001-15100" in notes[1]


def test_a_default_pool_in_use_is_replaced_whole() -> None:
    ports, notes = choose(WantedPorts(), {}, Machine(7150))
    assert ports == Ports(7070, 7099, (15_000, 15_099))
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (WantedPorts(manager=7070), r"port 7070 \(--manager-port\) is taken"),
        (WantedPorts(admin=7070), r"port 7070 \(--proxy-admin-port\) is taken"),
        (WantedPorts(pool=(7000, 7098)), r"pool 7000-7098 .* has taken 7070"),
        (WantedPorts(manager=7100), r"port 7100 \(--manager-port\) lies in the pool"),
        (WantedPorts(manager=8000, admin=8000), "cannot both be 8000"),
    ],
)
def test_given_ports_must_be_right(wanted: WantedPorts, said: str) -> None:
    with pytest.raises(DureError, match=said):
        choose(wanted, {}, Machine(7070))


def test_recorded_ports_are_used_again_and_the_pool_whatever_happens() -> None:
    recorded = {"manager_port": 9001, "proxy_admin_port": 9002, "proxy_ports": "9100-9109"}
    assert choose(WantedPorts(), recorded, Machine(7070))[0] == Ports(9001, 9002, (9100, 9109))
    ports, notes = choose(WantedPorts(), recorded, Machine(9001, 9105))
    assert ports == Ports(15_000, 9002, (9100, 9109))
    assert "9001" in notes[0] and "9105" in notes[1]
    with pytest.raises(DureError, match="9100"):
        choose(WantedPorts(), recorded, Machine(*range(9100, 9110)))


def test_programs_that_still_run_keep_their_ports() -> None:
    recorded = {"manager_port": 9001, "proxy_admin_port": 9002, "proxy_ports": "9100-9109"}
    running = frozenset({"manager", "proxy"})
    busy = Machine(9001, 9002, *range(9100, 9110))
    assert choose(WantedPorts(), recorded, busy, running) == (Ports(9001, 9002, (9100, 9109)), [])
    with pytest.raises(DureError, match="still runs"):
        choose(WantedPorts(manager=9005), recorded, busy, running)


@pytest.mark.parametrize("text", ["7100", "7199-7100", "0-5", "1-70000", "a-b", "", "1-2-3"])
def test_a_bad_range(text: str) -> None:
    with pytest.raises(ValueError, match="range of ports"):
        parse_pool(text)


def test_metrics_ports_are_the_usual_ones_the_recorded_ones_or_any_that_are_free() -> None:
    ports, two = Ports(7070, 7099, (7100, 7199)), ("manager", "agent-1")
    recorded = {"metrics_ports": [9001, 9002]}
    assert choose_metrics((*two, "agent-2"), {}, Machine(), ports) == (7098, 7097, 7096)
    assert choose_metrics(two, {"metrics_ports": [9001]}, Machine(), ports) == (9001, 7097)
    assert choose_metrics(two, recorded, Machine(9002), ports) == (9001, 15_000)
    # The program itself has taken it: it was left over from before.
    assert choose_metrics(two, recorded, Machine(9002), ports, frozenset({"agent-1"})) == (9001, 9002)
    # Nothing else of the same cluster has them, nor two of its programs one.
    assert choose_metrics(("manager",), {}, Machine(), Ports(7098, 7099, (7100, 7199))) == (15_000,)
    assert choose_metrics(two, {"metrics_ports": [9001, 9001]}, Machine(), ports) == (9001, 15_000)
