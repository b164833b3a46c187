"""What the store forgets: events, ended replicas and expired tokens do not pile up for ever."""

from __future__ import annotations

from sqlalchemy import delete, func, select

from dure.manager import schema
from dure.manager.model import KernelPhase
from dure.manager.store import Store, now_ms
from dure.wire import names

DAY_MS = 24 * 3600 * 1000
EVENTS_KEPT_MS = 14 * DAY_MS
EVENTS_PER_ENDPOINT_MAX = 2_000
TOKENS_KEPT_MS = 30 * DAY_MS
REPLICAS_KEPT_MS = 3 * DAY_MS
JOIN_TOKENS_KEPT_MS = DAY_MS
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
        await session.execute(
            delete(schema.JoinToken).where(schema.JoinToken.expires_ms < now - JOIN_TOKENS_KEPT_MS)
        )
