"""The agents as they are now: in memory, never in the store.

`Fleet` knows when each agent was last heard of and holds its open stream; what follows from that is
decided in `liveness`. Agents are told what is wanted of them through `Connection.dirty`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from dure.fleet.v1 import fleet_pb2
from dure.manager import liveness
from dure.manager.model import AgentStatus

OUTBOX_MAX = 256


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


@dataclass(eq=False)
class Connection:
    """One stream of an agent. `dirty` is set when what is wanted there may have changed; `replaced`
    when a newer stream of the same agent took over."""

    agent_uid: str
    dirty: asyncio.Event = field(default_factory=asyncio.Event)
    # gRPC takes one message at a time.
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    replaced: asyncio.Event = field(default_factory=asyncio.Event)
    # Messages that wait for their turn on the stream, beside what is wanted.
    outbox: asyncio.Queue[fleet_pb2.ConnectResponse] = field(
        default_factory=lambda: asyncio.Queue(OUTBOX_MAX)
    )
    # How often its kernels are measured, as it was last told; agents begin with this.
    measure_ms: int = 5_000
    # Generation of each kernel's wish as sent on this stream.
    sent: dict[str, int] = field(default_factory=dict)


@dataclass
class _Member:
    group: str
    heard_ms: int
    closed_ms: int | None = None
    connection: Connection | None = None
    connected: bool = False

    def sighting(self) -> liveness.Sighting:
        return liveness.Sighting(self.group, self.heard_ms, self.closed_ms, self.connected)


class Fleet:
    """Who is there."""

    def __init__(self) -> None:
        self.started_ms = monotonic_ms()
        self._members: dict[str, _Member] = {}
        self._last: tuple[dict[str, AgentStatus], frozenset[str]] = ({}, frozenset())

    def expect(self, agents: Iterable[tuple[str, str]]) -> None:
        """Agents (uid, group) known from before this manager's start."""
        for uid, group in agents:
            self._members.setdefault(uid, _Member(group, self.started_ms))

    def opened(self, uid: str, group: str) -> Connection:
        """A stream of an agent begins; one that was open ends."""
        member = self._members.setdefault(uid, _Member(group, monotonic_ms()))
        if member.connection is not None:
            member.connection.replaced.set()
        member.group = group
        member.connection = Connection(uid)
        member.connected, member.closed_ms, member.heard_ms = True, None, monotonic_ms()
        return member.connection

    def connected(self, uid: str) -> bool:
        """Whether a stream of an agent is open."""
        member = self._members.get(uid)
        return member is not None and member.connection is not None

    def ask(self, uid: str, message: fleet_pb2.ConnectResponse) -> bool:
        """Sends a message on an agent's stream; False if there is none, or it does not keep up."""
        member = self._members.get(uid)
        if member is None or member.connection is None:
            return False
        try:
            member.connection.outbox.put_nowait(message)
        except asyncio.QueueFull:
            return False
        return True

    def measure(self, often: Collection[str], often_ms: int, else_ms: int) -> None:
        """Tells each agent how often to measure its kernels: those in `often` by `often_ms`."""
        for uid, member in self._members.items():
            wanted = often_ms if uid in often else else_ms
            connection = member.connection
            if connection is None or connection.measure_ms == wanted:
                continue
            interval = fleet_pb2.MeasureInterval(interval_ms=wanted)
            if self.ask(uid, fleet_pb2.ConnectResponse(measure_interval=interval)):
                connection.measure_ms = wanted

    def heard(self, uid: str) -> None:
        self._members[uid].heard_ms = monotonic_ms()

    def closed(self, connection: Connection) -> None:
        member = self._members[connection.agent_uid]
        if member.connection is connection:
            member.connection, member.closed_ms = None, monotonic_ms()

    def wanted_changed(self, uid: str) -> None:
        """What is wanted of an agent may have changed: its stream looks."""
        member = self._members.get(uid)
        if member is not None and member.connection is not None:
            member.connection.dirty.set()

    def statuses(self) -> dict[str, AgentStatus]:
        now = monotonic_ms()
        return {
            uid: liveness.status_of(member.sighting(), self.started_ms, now)
            for uid, member in self._members.items()
        }

    def away_ms(self) -> dict[str, int]:
        """How long each agent has not been heard of."""
        now = monotonic_ms()
        return {uid: liveness.away_ms(member.sighting(), now) for uid, member in self._members.items()}

    def given_up(self) -> frozenset[str]:
        sightings = {uid: member.sighting() for uid, member in self._members.items()}
        return liveness.given_up(sightings, self.started_ms, monotonic_ms())

    def changed(self) -> set[str]:
        """Agents whose status, or whose being given up on, differs from the last call."""
        statuses, given_up = self.statuses(), self.given_up()
        before_statuses, before_given_up = self._last
        self._last = statuses, given_up
        return {uid for uid in statuses if statuses[uid] is not before_statuses.get(uid)} | (
            given_up ^ before_given_up
        )
