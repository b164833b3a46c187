"""Which ports a development cluster listens on. The decision is pure: what is taken is asked of `Probe`."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dure.wire.errors import DureError

MANAGER_PORT = 7070
ADMIN_PORT = 7099
POOL = (7100, 7199)
# The manager's, then each agent's, downwards.
METRICS_PORT = 7098
# Below the ports that agents lease (20000 up) and that outgoing connections are given (32768 up).
_SPARE = (10_000, 19_999)
_TRIES_MAX = 200


@dataclass(frozen=True)
class Ports:
    """Manager (gRPC), the proxy's admin port, and the proxy's pool for endpoints, first and last."""

    manager: int
    admin: int
    pool: tuple[int, int]


@dataclass(frozen=True)
class WantedPorts:
    """What was given on the command line; None is up to us."""

    manager: int | None = None
    admin: int | None = None
    pool: tuple[int, int] | None = None


class Probe(Protocol):
    """What is free on this machine."""

    def taken(self, port: int) -> bool: ...

    def spare(self, count: int) -> int:
        """The first of `count` free ports in a row."""
        ...


def choose(
    wanted: WantedPorts, recorded: Mapping[str, Any], probe: Probe, running: frozenset[str] = frozenset()
) -> tuple[Ports, list[str]]:
    """The ports, and a line for each that is not the one that a user would expect.

    Given ones must be free. Recorded ones are used again, the pool even if some of it is taken: addresses
    are permanent. Default ones that are taken are replaced. Ports of programs in `running` (`manager`,
    `proxy`), which were left over from before, stay as they were recorded.
    """
    notes: list[str] = []

    def single(program: str, what: str, given: int | None, key: str, default: int, flag: str) -> int:
        kept = recorded.get(key)
        if program in running and isinstance(kept, int):
            if given not in (None, kept):
                raise DureError(f"the {program} of this folder still runs on {what} {kept}; stop it first")
            return kept
        if given is not None:
            if probe.taken(given):
                raise DureError(
                    f"port {given} ({flag}) is taken by another process; free it or give another one"
                )
            return given
        first = kept if isinstance(kept, int) else default
        if not probe.taken(first):
            return first
        spare = probe.spare(1)
        notes.append(f"port {first} is taken: the {what} is {spare} instead")
        return spare

    manager = single(
        "manager", "manager's port", wanted.manager, "manager_port", MANAGER_PORT, "--manager-port"
    )
    admin = single(
        "proxy", "proxy's admin port", wanted.admin, "proxy_admin_port", ADMIN_PORT, "--proxy-admin-port"
    )
    kept_pool = _recorded_pool(recorded)
    pool = wanted.pool or kept_pool or POOL
    if "proxy" in running:
        pool = kept_pool or pool
    else:
        busy = [port for port in range(pool[0], pool[1] + 1) if probe.taken(port)]
        # Another cluster's pool is mostly unbound: that its other ports are taken tells that it is there.
        if wanted.pool is None and kept_pool is None and (busy or notes):
            size = POOL[1] - POOL[0] + 1
            first = probe.spare(size)
            pool = (first, first + size - 1)
            notes.append(f"endpoints get ports {pool[0]}-{pool[1]}: {POOL[0]}-{POOL[1]} are in use")
        elif busy and (len(busy) == pool[1] - pool[0] + 1 or wanted.pool is not None):
            listed = ", ".join(map(str, busy[:5])) + (" ..." if len(busy) > 5 else "")
            raise DureError(
                f"of the pool {pool[0]}-{pool[1]} (--proxy-ports) another process has taken {listed}; "
                "free that, or give another range"
            )
        elif busy:
            notes.append(
                f"of the pool {pool[0]}-{pool[1]} these ports are taken: {', '.join(map(str, busy[:10]))}"
            )
    for port, what in ((manager, "--manager-port"), (admin, "--proxy-admin-port")):
        if pool[0] <= port <= pool[1]:
            raise DureError(f"port {port} ({what}) lies in the pool {pool[0]}-{pool[1]} (--proxy-ports)")
    if manager == admin:
        raise DureError(f"the manager and the proxy's admin port cannot both be {manager}")
    return Ports(manager, admin, pool), notes


def choose_metrics(
    members: Sequence[str],
    recorded: Mapping[str, Any],
    probe: Probe,
    ports: Ports,
    running: frozenset[str] = frozenset(),
) -> tuple[int, ...]:
    """Ports for the metrics of each program: recorded ones again, else the usual ones or any that are free.
    Nobody gives them out, so one that changes is no news; those of programs in `running` stay.
    """
    kept = recorded.get("metrics_ports")
    chosen: list[int] = []
    for index, member in enumerate(members):
        wanted = METRICS_PORT - index
        if isinstance(kept, list) and index < len(kept) and isinstance(kept[index], int):
            wanted = kept[index]
        used = {ports.manager, ports.admin, *range(ports.pool[0], ports.pool[1] + 1), *chosen}
        for _ in range(_TRIES_MAX):
            if wanted not in used and (member in running or not probe.taken(wanted)):
                break
            wanted = probe.spare(1)
        chosen.append(wanted)
    return tuple(chosen)


def parse_pool(text: str) -> tuple[int, int]:
    """`7100-7199`. Raises ValueError with a sentence."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit()):
        raise ValueError(f"`{text[:40]}` is not a range of ports such as 7100-7199")
    pool = int(first), int(last)
    if not 0 < pool[0] <= pool[1] < 65536:
        raise ValueError(f"`{text[:40]}` is not a range of ports between 1 and 65535, first to last")
    return pool


def _recorded_pool(recorded: Mapping[str, Any]) -> tuple[int, int] | None:
    text = recorded.get("proxy_ports")
    return parse_pool(text) if isinstance(text, str) else None


class LoopbackProbe:
    """Tries to bind on 127.0.0.1."""

    def taken(self, port: int) -> bool:
        with socket.socket() as probe:
            # As servers do: a connection in TIME_WAIT does not take a port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return True
        return False

    def spare(self, count: int) -> int:
        for _ in range(_TRIES_MAX):
            # At random: two clusters that start together must not choose the same.
            first = random.randint(_SPARE[0], _SPARE[1] - count + 1)
            if not any(self.taken(port) for port in range(first, first + count)):
                return first
        raise DureError(f"found no {count} free ports between {_SPARE[0]} and {_SPARE[1]}")
