"""Quotas of projects, as the store has them."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import schema, usage
from dure.manager.usage import Wanted
from dure.wire import errors


async def check(
    session: AsyncSession,
    project: schema.Project,
    endpoint_uid: str | None,
    replica_count: int,
    cluster_size: int,
    slots: Mapping[str, int],
) -> None:
    """Raises ResourceExhausted unless an endpoint (None: a new one) may want this much.

    Run it in the transaction that stores the change, or two changes pass that do not fit together. `slots`
    are milli-units of each kernel.
    """
    # As it is now: the caller may have read it in an earlier transaction.
    now = await session.get(schema.Project, project.uid, populate_existing=True)
    if now is None:
        raise errors.NotFound(f"project `{project.name}` was deleted just now", reason="PROJECT_NOT_FOUND")
    if not now.quota_slots and not now.quota_endpoints:
        return
    living = await wanted(session, project.uid)
    before = living.pop(endpoint_uid, None) if endpoint_uid is not None else None
    after = Wanted(replica_count, cluster_size, slots)
    problems = usage.exceeded(now.quota_slots, living.values(), before, after)
    if endpoint_uid is None and 0 < now.quota_endpoints <= len(living):
        problems.append(
            f"endpoints: the quota is {now.quota_endpoints}, and there are {len(living)}; one that is being "
            "deleted counts until it is gone"
        )
    if problems:
        raise errors.ResourceExhausted(
            f"this goes over the quota of project `{project.name}`: {'; '.join(problems)}. Ask for less, "
            f"scale down or delete another endpoint (`dure project usage {project.name}` says what is used), "
            "or have an administrator raise it with `dure project update`",
            reason="QUOTA_EXCEEDED",
        )


async def wanted(session: AsyncSession, project_uid: str) -> dict[str, Wanted]:
    """What each living endpoint of a project wants, by uid; a validation wants one replica."""
    rows = await session.execute(
        select(
            schema.Endpoint.uid,
            schema.Endpoint.replica_count,
            schema.Endpoint.desired_replicas,
            schema.Endpoint.validation,
            schema.Revision.spec,
        )
        .join(
            schema.Revision,
            (schema.Revision.endpoint_uid == schema.Endpoint.uid)
            & (schema.Revision.number == schema.Endpoint.revision),
        )
        .where(schema.Endpoint.project_uid == project_uid, schema.Endpoint.deleted_ms.is_(None))
    )
    return {
        uid: Wanted(1 if validation else max(count, desired), spec["cluster_size"], spec["slots"])
        for uid, count, desired, validation, spec in rows
    }
