"""What happened to a node, told to the endpoints that it concerns."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from dure.manager import schema
from dure.manager.hellos import News
from dure.manager.model import KernelPhase, ReplicaStatus
from dure.manager.store import Tx
from dure.wire.quantities import DEVICES, SHARES

# More endpoints are not told by one report; they are looked at all the same.
TOLD_MAX = 1_000


async def tell(tx: Tx, agent: schema.Agent, news: Sequence[News]) -> None:
    """Events for the endpoints with a session that has devices there, and of good news for those that wait
    for some; all with a session there are looked at again."""
    rows = list(
        await tx.session.scalars(
            select(schema.Kernel).where(
                schema.Kernel.agent_uid == agent.uid, schema.Kernel.phase != KernelPhase.GONE
            )
        )
    )
    for uid in dict.fromkeys(kernel.endpoint_uid for kernel in rows):
        tx.touch("endpoint", uid)
    if not news:
        return
    there = dict.fromkeys(kernel.endpoint_uid for kernel in rows if kernel.devices)
    waiting = dict.fromkeys(await _waiting(tx, agent.resource_group))
    for one in news:
        concerned = there if one.warning else there | waiting
        for uid in list(concerned)[:TOLD_MAX]:
            tx.event(uid, one.reason, f"{agent.name}: {one.sentence}", warning=one.warning)


async def _waiting(tx: Tx, group: str) -> list[str]:
    """Endpoints with a replica that found no place in a resource group, and needs devices."""
    rows = await tx.session.execute(
        select(schema.Replica.endpoint_uid, schema.Revision.spec)
        .join(
            schema.Revision,
            (schema.Revision.endpoint_uid == schema.Replica.endpoint_uid)
            & (schema.Revision.number == schema.Replica.revision),
        )
        .where(
            schema.Replica.status == ReplicaStatus.PENDING.value,
            schema.Replica.ended_ms.is_(None),
            schema.Revision.spec["resource_group"].as_string() == group,
        )
        .limit(TOLD_MAX)
    )
    return [uid for uid, spec in rows if SHARES in spec["slots"] or DEVICES in spec["slots"]]
