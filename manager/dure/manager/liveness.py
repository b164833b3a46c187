"""Which agents are there, and which are given up on: a function of when each was last heard of.

An agent is LOST two seconds after its stream closed, or six after its last heartbeat. A lost agent gets
nothing new, but its sessions most likely still serve (a program that crashed, a restart, an upgrade), so
replacements are started only when it has not come back within GIVE_UP_MS. A manager that has just
started, or taken over, waits at least ARRIVAL_MS for everyone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dure.manager.model import AgentStatus

HEARTBEAT_MS = 2_000
CLOSED_GRACE_MS = 2_000
SILENCE_MS = 6_000
ARRIVAL_MS = 15_000
# A crashed agent that is started again within 15 s, and then needs a moment to adopt and connect,
# must find all its replicas in place.
GIVE_UP_MS = 20_000
# At most this part of a group (but always one agent) is given up on without a pause: when many vanish
# at once the network or the manager is more likely to be at fault than all of them.
GIVE_UP_SHARE = 0.2
GIVE_UP_PAUSE_MS = 60_000


@dataclass(frozen=True)
class Sighting:
    """What the manager knows of an agent's presence, by its own monotonic clock.

    `heard_ms`: last message, or the manager's start if there was none. `closed_ms`: when its stream
    ended, None while it is open; `connected` in this manager's life at all.
    """

    group: str
    heard_ms: int
    closed_ms: int | None
    connected: bool


def status_of(sighting: Sighting, started_ms: int, now_ms: int) -> AgentStatus:
    """Raises nothing; `started_ms` is when this manager began."""
    if not sighting.connected:
        return AgentStatus.AWAITED if now_ms - started_ms < ARRIVAL_MS else AgentStatus.LOST
    if sighting.closed_ms is not None:
        return AgentStatus.LOST if now_ms - sighting.closed_ms >= CLOSED_GRACE_MS else AgentStatus.ALIVE
    return AgentStatus.LOST if now_ms - sighting.heard_ms >= SILENCE_MS else AgentStatus.ALIVE


def away_ms(sighting: Sighting, now_ms: int) -> int:
    """How long an agent has not been heard of."""
    since_ms = sighting.heard_ms if sighting.closed_ms is None else sighting.closed_ms
    return max(0, now_ms - since_ms)


def given_up(sightings: Mapping[str, Sighting], started_ms: int, now_ms: int) -> frozenset[str]:
    """Agents that are not waited for any longer.

    In each group the longest away goes first; beyond the share of a group that may go at once, each
    further batch waits a pause longer.
    """
    groups: dict[str, list[str]] = {}
    for uid, sighting in sightings.items():
        groups.setdefault(sighting.group, []).append(uid)
    result: set[str] = set()
    for members in groups.values():
        lost = [uid for uid in members if status_of(sightings[uid], started_ms, now_ms) is AgentStatus.LOST]
        lost.sort(key=lambda uid: (-away_ms(sightings[uid], now_ms), uid))
        batch = max(1, int(len(members) * GIVE_UP_SHARE))
        for index, uid in enumerate(lost):
            if away_ms(sightings[uid], now_ms) >= GIVE_UP_MS + index // batch * GIVE_UP_PAUSE_MS:
                result.add(uid)
    return frozenset(result)
