"""The route of an endpoint from the store: what it says beside its replicas is read once for a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import routes, schema, views
from dure.manager.asked import METRICS_PATH
from dure.manager.model import EndpointStatus, ReplicaView
from dure.manager.serving import traffic
from dure.manager.store import now_ms
from dure.routing.v1 import routing_pb2
from dure.scaling.values import Source

# A proxy whose clock is behind must not take a revoked token for a good one in its last minutes.
CLOCK_SKEW_MAX_MS = 5 * 60 * 1000
SCRAPE_RULE_MS, SCRAPE_MS = 1_000, 10_000


@dataclass(frozen=True)
class Facts:
    """What a route says beside its replicas. `scraped_by_rule`: a rule looks at what replicas show."""

    project: str
    runtime: str
    scraped_by_rule: bool
    revoked_tokens: tuple[str, ...]


async def facts(session: AsyncSession, row: schema.Endpoint) -> Facts:
    """Of an endpoint as it is stored now."""
    ruled = (
        select(schema.ScalingRule.uid)
        .where(
            schema.ScalingRule.endpoint_uid == row.uid,
            schema.ScalingRule.source == Source.INFERENCE_FRAMEWORK.value,
            schema.ScalingRule.enabled,
        )
        .exists()
    )
    project, spec, by_rule = (
        await session.execute(
            select(schema.Project.name, schema.Revision.spec, ruled)
            .join(
                schema.Revision,
                (schema.Revision.endpoint_uid == row.uid) & (schema.Revision.number == row.revision),
            )
            .where(schema.Project.uid == row.project_uid)
        )
    ).one()
    revoked = await session.scalars(
        select(schema.Token.uid).where(
            schema.Token.endpoint_uid == row.uid,
            schema.Token.revoked_ms.is_not(None),
            schema.Token.expires_s * 1000 > now_ms() - CLOCK_SKEW_MAX_MS,
        )
    )
    return Facts(project, spec["asked"].get("runtime", "custom"), by_rule, tuple(revoked))


def route(row: schema.Endpoint, shown: Sequence[ReplicaView], facts: Facts) -> routing_pb2.Route:
    """As it should be now."""
    return routes.route(
        uid=row.uid,
        project=facts.project,
        name=row.name,
        port=row.port or 0,
        label=routes.host_label(row.name, row.uid),
        open_to_public=row.open_to_public,
        status=EndpointStatus(row.status),
        replicas=shown,
        pools=traffic(views.endpoint_view(row), shown),
        hold=row.idle,
        scrape=_scraping(row, facts),
        revoked_tokens=facts.revoked_tokens,
    )


def _scraping(row: schema.Endpoint, facts: Facts) -> routing_pb2.ScrapeSettings | None:
    """How replicas are scraped: often where a rule looks at it, now and then where something is to be
    expected there, else not at all (a program that knows no such path would only complain)."""
    if facts.scraped_by_rule:
        return routing_pb2.ScrapeSettings(path=row.metrics_path, interval_ms=SCRAPE_RULE_MS)
    if facts.runtime == "custom" and row.metrics_path == METRICS_PATH:
        return None
    return routing_pb2.ScrapeSettings(path=row.metrics_path, interval_ms=SCRAPE_MS)
