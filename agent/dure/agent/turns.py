"""Who may start on a device: kernels whose engines measure what is free of it start one after the other.

Those that share a device take turns in the order in which they came. A turn is over when its kernel is
healthy, has ended, or its time is up. Kernels of one session never wait for each other: they become healthy
together. Nothing here waits or looks at a clock.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

# A kernel is not waited for longer than this, from its turn to its command and from there to its health.
TURN_MAX_S = 1800.0


@dataclass(frozen=True)
class Starting:
    """A kernel in the line: its devices, its session, and what to call it. `until_s` is when its turn is over
    at the latest; None while it waits."""

    uid: str
    session: str
    name: str
    devices: frozenset[str]
    until_s: float | None = None


class Turns:
    """The line, oldest first."""

    def __init__(self) -> None:
        self._line: dict[str, Starting] = {}

    def enter(self, uid: str, session: str, name: str, devices: Collection[str]) -> None:
        """At the end of the line."""
        self._line[uid] = Starting(uid, session, name, frozenset(devices))

    def leave(self, uid: str) -> bool:
        """Gives up its turn, or its place. Whether it had one."""
        return self._line.pop(uid, None) is not None

    def begin(self, uid: str, until_s: float) -> None:
        """Its turn lasts until then at the latest; nothing for one that is not in the line."""
        if uid in self._line:
            one = self._line[uid]
            self._line[uid] = Starting(one.uid, one.session, one.name, one.devices, until_s)

    def before(self, uid: str, now_s: float) -> list[Starting]:
        """For whom it waits: those that came before it and share a device, and whose turn is not over."""
        own = self._line[uid]
        found = []
        for other in self._line.values():
            if other.uid == uid:
                break
            over = other.until_s is not None and other.until_s <= now_s
            if not over and other.devices & own.devices and other.session != own.session:
                found.append(other)
        return found


def turn_s(initial_delay_s: float, interval_s: float, retries: int) -> float:
    """How long a turn lasts at most once its command runs: until its health check must have decided."""
    return min(TURN_MAX_S, initial_delay_s + (retries + 1) * interval_s)
