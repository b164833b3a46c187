"""Ports that belong to this process of pytest alone: tests that run side by side never choose the same.

Not those that the system gives out by itself (32768 up), for these go to anybody between a look and a bind.
Blocks are taken from the upper end, for an agent that is no test's leases from 20000 up.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import socket
import time
from collections.abc import Iterator

FIRST, END = 20_000, 32_000
BLOCK = 50
_SESSIONS, _SPARE = 300, 50
_TRIES = 5
_kept = contextlib.ExitStack()
atexit.register(_kept.close)


@contextlib.contextmanager
def row(count: int) -> Iterator[range]:
    """So many ports in a row, until the end of the block."""
    with contextlib.ExitStack() as locks:
        yield _take(count, locks)


@functools.cache
def sessions() -> range:
    """What agents may lease. Tests of one process come one after the other; each has leases of its own."""
    return _take(_SESSIONS, _kept)


@contextlib.contextmanager
def literal(port: int, limit_s: float = 300.0) -> Iterator[None]:
    """A port whose number a test cannot choose: waits until no other test has it."""
    deadline_s = time.monotonic() + limit_s
    with contextlib.ExitStack() as lock:
        while not _lock(port, lock):
            lock.close()
            assert time.monotonic() < deadline_s, f"another test has kept port {port} for {limit_s} s"
            time.sleep(0.2)
        yield


def option(ports: range) -> str:
    """As programs take it."""
    return f"{ports.start}-{ports.stop - 1}"


def free_ports(count: int) -> list[int]:
    """Ports at which nobody listens; they come again only after all others."""
    found: list[int] = []
    for port in itertools.islice(_spare(), _SPARE):
        with socket.socket() as probe:
            # As servers do: a connection in TIME_WAIT does not take a port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("0.0.0.0", port))
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports among {_SPARE}")


def free_port() -> int:
    return free_ports(1)[0]


@functools.cache
def _spare() -> Iterator[int]:
    return itertools.cycle(_take(_SPARE, _kept))


def _take(count: int, locks: contextlib.ExitStack) -> range:
    needed = -(-count // BLOCK)
    for _ in range(_TRIES):
        start = END - needed * BLOCK
        while start >= FIRST:
            with contextlib.ExitStack() as tried:
                for block in range(start, start + needed * BLOCK, BLOCK):
                    if not _lock(block, tried):
                        start = block - needed * BLOCK
                        break
                else:
                    locks.push(tried.pop_all())
                    return range(start, start + count)
    raise AssertionError(f"no {count} ports between {FIRST} and {END} that no other run of tests has taken")


def _lock(number: int, locks: contextlib.ExitStack) -> bool:
    """A socket with a name but no file: it is gone with its process, however that ends."""
    lock = locks.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    try:
        lock.bind(f"\0dure-test-ports-{number}")
    except OSError:
        return False
    return True
