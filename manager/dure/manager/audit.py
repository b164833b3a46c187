"""The audit trail: who changed what, written in groups and never at the cost of a call."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from dataclasses import dataclass, replace

from dure.manager import schema
from dure.manager.store import Store, now_ms
from dure.v1 import endpoint_pb2
from dure.wire import names
from dure.wire.backoff import backoff_s

log = logging.getLogger(__name__)

# Long enough for the files of an upload to become one record, short for a reader, who waits for none of it.
GATHER_S = 1.0
PENDING_MAX = 5_000
DETAIL_MAX, RESOURCE_MAX = 1_000, 300
# Whoever is refused again and again must not wash others' records out of a trail that is bounded.
REFUSED_PER_KEY_MAX, REFUSED_WINDOW_MS = 60, 60_000
KEYS_COUNTED_MAX = 10_000


@dataclass(frozen=True)
class Entry:
    """One call. `outcome` is `OK` or the name of a gRPC status; `merges`: alike ones become one record."""

    actor: str
    key_uid: str
    project: str
    method: str
    resource: str
    detail: str
    outcome: str
    peer: str
    merges: bool = False


@dataclass
class _Pending:
    uid: str
    time_ms: int
    entry: Entry
    count: int = 1


class Trail:
    """Takes entries at once and stores them soon."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: list[_Pending] = []
        self._merging: dict[Entry, _Pending] = {}
        self._refused: dict[str, int] = {}
        self._window_ends_ms = 0
        self._dropped = 0
        self._last = (0, 0)
        self._wake = asyncio.Event()
        self._flushing = asyncio.Lock()

    def record(self, entry: Entry) -> None:
        """Never waits and never fails; what there is no room for is counted in the log."""
        now = now_ms()
        if entry.outcome != "OK" and not self._may_be_refused(entry.key_uid, now):
            self._dropped += 1
            return
        alike = replace(entry, detail="", peer="")
        if entry.merges and (known := self._merging.get(alike)):
            known.count += 1
            return
        if len(self._pending) >= PENDING_MAX:
            self._dropped += 1
            return
        pending = _Pending(self._new_uid(now), now, entry)
        self._pending.append(pending)
        if entry.merges:
            self._merging[alike] = pending
        self._wake.set()

    def _new_uid(self, now: int) -> str:
        """Sorts after all that were made before, also within a millisecond: a trail has an order."""
        last_ms, sequence = self._last
        self._last = (now, 0) if now > last_ms else (last_ms + sequence // 4095, (sequence + 1) % 4096)
        return names.new_uid(self._last[0], self._last[1] << 62 | secrets.randbits(62))

    def _may_be_refused(self, key_uid: str, now: int) -> bool:
        if now >= self._window_ends_ms or len(self._refused) >= KEYS_COUNTED_MAX:
            self._refused.clear()
            self._window_ends_ms = now + REFUSED_WINDOW_MS
        self._refused[key_uid] = self._refused.get(key_uid, 0) + 1
        return self._refused[key_uid] <= REFUSED_PER_KEY_MAX

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            try:
                await self.flush()
                failures = 0
            except Exception:
                failures += 1
                delay_s = backoff_s(failures, first_s=0.1, max_s=5.0, jitter=random.random())
                log.exception("could not store audit records; again in %.1f s", delay_s)
                await asyncio.sleep(delay_s)

    async def flush(self) -> None:
        """Returns once everything that was recorded before is stored."""
        async with self._flushing:
            pending = self._pending
            self._pending, self._merging = [], {}
            self._wake.clear()
            if self._dropped:
                log.warning("%d audit records were dropped: too many at once", self._dropped)
                self._dropped = 0
            if not pending:
                return
            try:
                async with self._store.write() as tx:
                    tx.session.add_all(_row(each) for each in pending)
            except BaseException:
                # The store may have it all the same: a commit that was cancelled. Better twice than never.
                for each in pending:
                    each.uid = self._new_uid(each.time_ms)
                self._pending = [*pending, *self._pending][:PENDING_MAX]
                self._wake.set()
                raise


def _row(pending: _Pending) -> schema.AuditRecord:
    entry = pending.entry
    detail = entry.detail + (f" and {pending.count - 1} more" if pending.count > 1 else "")
    return schema.AuditRecord(
        uid=pending.uid,
        time_ms=pending.time_ms,
        actor=entry.actor[:80],
        key_uid=entry.key_uid[:36],
        project=entry.project[:64],
        method=entry.method[:64],
        resource=entry.resource[:RESOURCE_MAX],
        detail=detail[:DETAIL_MAX],
        outcome=entry.outcome[:32],
        peer=entry.peer[:64],
    )


def without_values(
    before: endpoint_pb2.Endpoint, after: endpoint_pb2.Endpoint
) -> tuple[endpoint_pb2.Endpoint, endpoint_pb2.Endpoint]:
    """Copies to be compared for a record: variables that differ still do, but their values are gone."""
    hidden = endpoint_pb2.Endpoint(), endpoint_pb2.Endpoint()
    for copy, endpoint in zip(hidden, (before, after), strict=True):
        copy.CopyFrom(endpoint)
        for variable in endpoint.environ:
            same = before.environ.get(variable) == after.environ.get(variable)
            copy.environ[variable] = "***" if same or copy is hidden[0] else "*** (another value)"
    return hidden
