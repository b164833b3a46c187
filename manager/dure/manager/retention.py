"""What the store forgets: events, audit records, ended replicas and expired tokens do not pile up."""

from __future__ import annotations

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import schema
from dure.manager.model import KernelPhase
from dure.manager.store import Store, now_ms
from dure.wire import names

DAY_MS = 24 * 3600 * 1000
EVENTS_KEPT_MS = 14 * DAY_MS
EVENTS_PER_ENDPOINT_MAX = 2_000
TOKENS_KEPT_MS = 30 * DAY_MS
REPLICAS_KEPT_MS = 3 * DAY_MS
REVISIONS_PER_ENDPOINT_MAX = 100
DELETED_ENDPOINTS_KEPT_MS = 90 * DAY_MS
JOIN_TOKENS_KEPT_MS = DAY_MS
AUDIT_KEPT_MS, AUDIT_MAX = 90 * DAY_MS, 50_000
# Rows dropped in one transaction: the writer must not be held for long.
ROWS_MAX = 1_000


async def prune(store: Store) -> None:
    """Drops at most ROWS_MAX rows of each kind; the next resync takes the rest."""
    now = now_ms()
    async with store.write() as tx:
        session = tx.session
        # Uids are UUIDv7 and sort by time.
        oldest = names.new_uid(now - EVENTS_KEPT_MS, 0)
        old = select(schema.Event.uid).where(schema.Event.uid < oldest).limit(ROWS_MAX)
        await session.execute(delete(schema.Event).where(schema.Event.uid.in_(old)))
        talkative = await session.scalars(
            select(schema.Event.endpoint_uid)
            .group_by(schema.Event.endpoint_uid)
            .having(func.count() > EVENTS_PER_ENDPOINT_MAX)
            .limit(100)
        )
        for endpoint_uid in list(talkative):
            mine = schema.Event.endpoint_uid == endpoint_uid
            newest = select(schema.Event.uid).where(mine).order_by(schema.Event.uid.desc())
            last_kept = await session.scalar(newest.offset(EVENTS_PER_ENDPOINT_MAX - 1).limit(1))
            await session.execute(delete(schema.Event).where(mine, schema.Event.uid < last_kept))
        expired_s = (now - TOKENS_KEPT_MS) // 1000
        await session.execute(delete(schema.Token).where(schema.Token.expires_s < expired_s))
        ended = list(
            await session.scalars(
                select(schema.Replica.uid)
                .where(schema.Replica.ended_ms < now - REPLICAS_KEPT_MS)
                .limit(ROWS_MAX)
            )
        )
        held = set(
            await session.scalars(
                select(schema.Kernel.replica_uid).where(
                    schema.Kernel.replica_uid.in_(ended), schema.Kernel.phase != KernelPhase.GONE
                )
            )
        )
        done = [uid for uid in ended if uid not in held]
        await session.execute(delete(schema.Kernel).where(schema.Kernel.replica_uid.in_(done)))
        await session.execute(delete(schema.Replica).where(schema.Replica.uid.in_(done)))
        await _prune_audit(session, now)
        await _prune_revisions(session)
        await _prune_endpoints(session, now)
        await session.execute(
            delete(schema.JoinToken).where(schema.JoinToken.expires_ms < now - JOIN_TOKENS_KEPT_MS)
        )


async def _prune_audit(session: AsyncSession, now: int) -> None:
    newest = select(schema.AuditRecord.uid).order_by(schema.AuditRecord.uid.desc())
    first_dropped = await session.scalar(newest.offset(AUDIT_MAX).limit(1)) or ""
    end = max(first_dropped, names.new_uid(now - AUDIT_KEPT_MS, 0))
    # The trail grows by many calls at once, so more goes at once than of the rest.
    old = select(schema.AuditRecord.uid).where(schema.AuditRecord.uid <= end).limit(10 * ROWS_MAX)
    await session.execute(delete(schema.AuditRecord).where(schema.AuditRecord.uid.in_(old)))


async def _prune_revisions(session: AsyncSession) -> None:
    """The newest are kept, and those that are wanted, stable or still run."""
    E, V = schema.Endpoint, schema.Revision
    old = list(
        await session.execute(
            select(V.endpoint_uid, V.number)
            .join(E, E.uid == V.endpoint_uid)
            .where(
                V.number <= E.newest_revision - REVISIONS_PER_ENDPOINT_MAX,
                V.number.not_in([E.revision, E.stable_revision]),
                ~select(schema.Replica.uid)
                .where(
                    schema.Replica.endpoint_uid == V.endpoint_uid,
                    schema.Replica.revision == V.number,
                    schema.Replica.ended_ms.is_(None),
                )
                .exists(),
            )
            .limit(ROWS_MAX)
        )
    )
    for endpoint_uid, number in old:
        for table in (schema.RevisionFolder, V):
            await session.execute(
                delete(table).where(table.endpoint_uid == endpoint_uid, table.number == number)
            )


async def _prune_endpoints(session: AsyncSession, now: int) -> None:
    """Deleted ones are kept for a while, for those who ask what there was; validations for a day."""
    E = schema.Endpoint
    gone = list(
        await session.scalars(
            select(E.uid)
            .where(
                (E.deleted_ms < now - DELETED_ENDPOINTS_KEPT_MS)
                | (E.validation & (E.deleted_ms < now - DAY_MS))
            )
            .limit(100)
        )
    )
    for table in (
        schema.RevisionFolder, schema.Revision, schema.Kernel, schema.Replica, schema.Token, schema.Event,
    ):  # fmt: skip
        await session.execute(delete(table).where(table.endpoint_uid.in_(gone)))
    await session.execute(delete(E).where(E.uid.in_(gone)))
