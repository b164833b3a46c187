"""Which port a session gets, as a decision over a table that all agents of the host share.

A lease belongs to a kernel's folder. A port that was given back rests: a route table on some proxy's
disk may still name it, and must not reach another tenant's model. Fixed ports are given out by number
and do not rest, since the next replica of the same endpoint needs the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

REST_S = 600.0
# An engine tries about ten of those that it may choose from.
GAP_MAX = 64


@dataclass(frozen=True)
class Lease:
    """A port in use (`released_at` is None) or at rest. Times are Unix seconds."""

    owner: str
    released_at: float | None = None


@dataclass(frozen=True)
class Table:
    """Leases by port. `cursor` is the port that was given out last: the next search begins after it."""

    leases: dict[int, Lease]
    cursor: int = 0


class NoPort(Exception):
    """No port can be had; the message says why."""


def lease(
    table: Table, owner: str, ports: range, now: float, is_free: Callable[[int], bool]
) -> tuple[int, Table]:
    """A port for `owner`: the one it has, else the next that nobody has, that does not rest and is free."""
    for port, held in table.leases.items():
        if held.owner == owner and held.released_at is None:
            return port, table
    start = table.cursor + 1 if table.cursor in ports else ports.start
    for port in (*range(start, ports.stop), *range(ports.start, start)):
        if _is_usable(table, port, now) and is_free(port):
            return port, Table({**table.leases, port: Lease(owner)}, cursor=port)
    raise _no_port(table, ports, now)


def lease_fixed(table: Table, owner: str, port: int, is_free: Callable[[int], bool]) -> Table:
    """The declared port for `owner`."""
    advice = "write {port} in the command"
    return _lease_number(table, owner, port, is_free, f"port {port}", advice)


def lease_rendezvous(table: Table, owner: str, port: int, is_free: Callable[[int], bool]) -> Table:
    """The port at which the kernels of a session meet, for `owner`."""
    advice = "a new session gets another one"
    return _lease_number(table, owner, port, is_free, f"rendezvous port {port}", advice)


def _lease_number(
    table: Table, owner: str, port: int, is_free: Callable[[int], bool], what: str, advice: str
) -> Table:
    held = table.leases.get(port)
    if held is not None and held.released_at is None:
        if held.owner == owner:
            return table
        raise NoPort(f"{what} of this host is taken by another session; {advice}")
    if not is_free(port):
        raise NoPort(f"{what} of this host is taken by a process outside of Dure; {advice}")
    return Table({**table.leases, port: Lease(owner)}, cursor=table.cursor)


def gap(table: Table, ports: range, now: float) -> range:
    """Ports in a row that nobody has and that do not rest, at most GAP_MAX, from the next one on. Few are
    chosen only when there are no more: another kernel may just be getting one of them."""
    start = table.cursor + 1 if table.cursor in ports else ports.start
    best = range(0)
    for part in (range(start, ports.stop), range(ports.start, start)):
        port = part.start
        while port < part.stop:
            end = port
            while end < part.stop and end - port < GAP_MAX and _is_usable(table, end, now):
                end += 1
            if end - port == GAP_MAX:
                return range(port, end)
            best = max(best, range(port, end), key=len)
            port = end + 1
    if not best:
        raise _no_port(table, ports, now)
    return best


def claim(table: Table, owner: str, port: int) -> Table:
    """A port that an engine has chosen for `owner`, which has no other."""
    leases = {
        number: held
        for number, held in table.leases.items()
        if held.owner != owner or held.released_at is not None
    }
    return Table({**leases, port: Lease(owner)}, cursor=port)


def release(table: Table, owner: str, now: float) -> Table:
    """Lets the ports of `owner` rest."""
    return replace(
        table,
        leases={
            port: Lease(held.owner, now) if held.owner == owner and held.released_at is None else held
            for port, held in table.leases.items()
        },
    )


def tidy(table: Table, now: float, is_alive: Callable[[str], bool]) -> Table:
    """Drops leases that have rested; lets rest what belongs to owners that are no more."""
    leases: dict[int, Lease] = {}
    for port, held in table.leases.items():
        if held.released_at is None:
            leases[port] = held if is_alive(held.owner) else Lease(held.owner, now)
        elif not _rested(held, now):
            # A clock that was set back must not make a rest last longer than it should.
            leases[port] = Lease(held.owner, min(held.released_at, now))
    return replace(table, leases=leases)


def parse_range(text: str) -> range:
    """`20000-29999`, both ends included. Raises ValueError with a sentence."""
    first, dash, last = text.partition("-")
    if not (dash and first.strip().isdecimal() and last.strip().isdecimal()):
        raise ValueError(f"`{text}` is not a range of ports; write one such as 20000-29999")
    ports = range(int(first), int(last) + 1)
    if not (1024 <= ports.start <= ports.stop - 1 <= 65535):
        raise ValueError(f"`{text}` is not a range of ports between 1024 and 65535, lower end first")
    return ports


def _is_usable(table: Table, port: int, now: float) -> bool:
    held = table.leases.get(port)
    return held is None or _rested(held, now)


def _no_port(table: Table, ports: range, now: float) -> NoPort:
    resting = sum(
        1
        for port, held in table.leases.items()
        if port in ports and held.released_at is not None and not _rested(held, now)
    )
    return NoPort(
        f"no free port among {ports.start}-{ports.stop - 1} ({resting} rest for 10 minutes after their use); "
        "give the agent more with --session-ports"
    )


def _rested(held: Lease, now: float) -> bool:
    return held.released_at is not None and now - held.released_at >= REST_S
