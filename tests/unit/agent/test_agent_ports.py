"""Leases of ports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.agent import ports
from dure.agent.ports import REST_S, Lease, NoPort, Table

FEW = range(20000, 20003)


def free(_: int) -> bool:
    return True


def test_a_port_rests_ten_minutes() -> None:
    table = Table({})
    given_ports = []
    for owner in ("a", "b", "c"):
        port, table = ports.lease(table, owner, FEW, 0.0, free)
        given_ports.append(port)
    assert sorted(given_ports) == list(FEW)
    table = ports.release(table, "b", now=100.0)
    with pytest.raises(NoPort, match="1 rest for 10 minutes"):
        ports.lease(table, "d", FEW, 100.0 + REST_S - 1, free)
    port, table = ports.lease(table, "d", FEW, 100.0 + REST_S, free)
    assert port == given_ports[1]


def test_asking_again_gives_the_same_port() -> None:
    port, table = ports.lease(Table({}), "a", FEW, 0.0, free)
    assert ports.lease(table, "a", FEW, 0.0, free) == (port, table)


def test_ports_that_others_hold_are_passed_over() -> None:
    port, _ = ports.lease(Table({}), "a", FEW, 0.0, lambda port: port == 20002)
    assert port == 20002


def test_a_fixed_port_does_not_rest_but_is_exclusive() -> None:
    table = ports.lease_fixed(Table({}), "a", 8000, free)
    assert ports.lease_fixed(table, "a", 8000, lambda _: False) == table
    with pytest.raises(NoPort, match="another session"):
        ports.lease_fixed(table, "b", 8000, free)
    table = ports.release(table, "a", 5.0)
    assert ports.lease_fixed(table, "b", 8000, free).leases[8000] == Lease("b")
    with pytest.raises(NoPort, match="outside of Dure"):
        ports.lease_fixed(table, "b", 8001, lambda _: False)


def test_owners_that_are_no_more_let_go_with_a_rest() -> None:
    table = Table({20000: Lease("dead"), 20001: Lease("alive"), 20002: Lease("old", 0.0)})
    tidied = ports.tidy(table, 5000.0, lambda owner: owner == "alive")
    assert tidied.leases == {20000: Lease("dead", 5000.0), 20001: Lease("alive")}


def test_a_clock_set_back_does_not_prolong_a_rest() -> None:
    table = ports.tidy(Table({20000: Lease("a", 9000.0)}), 100.0, free_owner)
    assert table.leases[20000].released_at == 100.0


def free_owner(_: str) -> bool:
    return True


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(0, 400)), max_size=40))
def test_no_port_has_two_owners_and_none_comes_back_early(events: list[tuple[str, bool, int]]) -> None:
    table, now = Table({}), 0.0
    held: dict[str, int] = {}
    released: dict[int, float] = {}
    for owner, wants, later_s in events:
        now += later_s
        table = ports.tidy(table, now, free_owner)
        if not wants:
            table = ports.release(table, owner, now)
            if owner in held:
                released[held.pop(owner)] = now
            continue
        try:
            port, table = ports.lease(table, owner, range(20000, 20005), now, free)
        except NoPort:
            assert owner not in held
            continue
        assert held.get(owner, port) == port
        assert all(port != other for whose, other in held.items() if whose != owner)
        if owner not in held and port in released:
            assert now - released[port] >= REST_S
        held[owner] = port


@pytest.mark.parametrize("text", ["", "1", "20000", "20001-20000", "80-90", "a-b", "60000-70000"])
def test_wrong_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ports"):
        ports.parse_range(text)


def test_a_range_has_both_ends() -> None:
    assert ports.parse_range("20000-20001") == range(20000, 20002)


@given(
    st.dictionaries(
        st.integers(20000, 20199),
        st.builds(Lease, st.sampled_from("abc"), st.none() | st.floats(0, 2000)),
        max_size=150,
    ),
    st.integers(19990, 20210),
    st.integers(1, 200),
)
def test_an_engine_chooses_only_among_ports_that_nobody_has(
    leases: dict[int, Lease], cursor: int, size: int
) -> None:
    """A row is offered whenever there is a free port, as long a one as there is; what is claimed is had."""
    table, everyone, now = Table(leases, cursor), range(20000, 20000 + size), 2000.0

    def usable(port: int) -> bool:
        held = leases.get(port)
        return held is None or (held.released_at is not None and now - held.released_at >= REST_S)

    if not any(map(usable, everyone)):
        with pytest.raises(NoPort):
            ports.gap(table, everyone, now)
        return
    row = ports.gap(table, everyone, now)
    assert 1 <= len(row) <= ports.GAP_MAX and row.step == 1
    assert all(port in everyone and usable(port) for port in row)
    after = ports.claim(table, "new", row[-1])
    assert after.leases[row[-1]] == Lease("new") and row[-1] not in ports.gap(
        Table({**after.leases, 30000: Lease("x")}, after.cursor), range(20000, 20400), now
    )
    # It has one port only.
    again = ports.claim(after, "new", 20399)
    assert [port for port, held in again.leases.items() if held.owner == "new"] == [20399]
