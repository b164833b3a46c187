"""Who listens on a port of this node, by /proc: a lease is worth nothing if a stranger answers there."""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LISTEN = "0A"
PORTS_SHOWN_MAX = 3


@dataclass(frozen=True)
class Listener:
    """A listening socket: the address it is bound to, and its inode."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    inode: int


def reached(port: int, host: str) -> tuple[frozenset[int], str]:
    """Inodes of the sockets that those who come to `host:port` may reach; if there are none, why not."""
    found = listeners(port)
    # One that is bound to the very address wins over one that is bound to all.
    exact = [one for one in found if str(one.address) == host]
    inodes = frozenset(one.inode for one in exact or [one for one in found if one.address.is_unspecified])
    if inodes:
        return inodes, ""
    if not found:
        return inodes, f"nothing listens on port {port}"
    where = ", ".join(sorted({str(one.address) for one in found}))
    return inodes, f"listens on {where} only, while proxies come to {host}: listen on 0.0.0.0"


def stranger(port: int, inodes: frozenset[int], pids: Iterable[int]) -> str:
    """Empty if all the sockets are of the processes, else a sentence."""
    strange = inodes - inodes_of(pids)
    if strange:
        return f"port {port} is taken by another process{_name_of(min(strange))}, not by the session"
    return ""


def elsewhere(port: int, pids: Iterable[int], inside: int = 0) -> str:
    """The advice for a program that listens on other ports than the one that it was given, else empty.
    `inside` is a process in whose network to look, 0 for this one's."""
    own = inodes_of(pids)
    others = {number for number, listener in _listening(inside) if listener.inode in own}
    if not others or port in others:
        return ""
    shown = ", ".join(map(str, sorted(others)[:PORTS_SHOWN_MAX]))
    return f" (the session listens on {shown}): let its command listen on {{port}}, or on $PORT"


def listeners(port: int, inside: int = 0) -> list[Listener]:
    return [listener for number, listener in _listening(inside) if number == port]


def _listening(inside: int = 0) -> Iterator[tuple[int, Listener]]:
    """Every listening socket, by its port."""
    network = f"/proc/{inside}/net" if inside else "/proc/net"
    for name in ("tcp", "tcp6"):
        try:
            with open(f"{network}/{name}", encoding="ascii") as file:
                next(file)
                for line in file:
                    fields = line.split()
                    if fields[3] != _LISTEN:
                        # Listening ones come first, and there can be very many others.
                        break
                    address, _, number = fields[1].partition(":")
                    yield int(number, 16), Listener(_address(address), int(fields[9]))
        except (FileNotFoundError, ProcessLookupError):
            continue


def inodes_of(pids: Iterable[int]) -> set[int]:
    """Inodes of the sockets that the processes hold."""
    found: set[int] = set()
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for name in names:
            try:
                target = os.readlink(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return found


def _name_of(inode: int) -> str:
    for name in os.listdir("/proc"):
        if name.isdecimal() and inode in inodes_of([int(name)]):
            try:
                with open(f"/proc/{name}/comm", encoding="utf-8", errors="replace") as file:
                    return f" ({file.read().strip()}, pid {name})"
            except OSError:
                return f" (pid {name})"
    return ""


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    # The kernel prints 32-bit words in the machine's byte order.
    words = struct.pack(f"={len(text) // 8}I", *(int(text[i : i + 8], 16) for i in range(0, len(text), 8)))
    if len(words) == 4:
        return ipaddress.IPv4Address(words)
    address = ipaddress.IPv6Address(words)
    return address.ipv4_mapped or address
