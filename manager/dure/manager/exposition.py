"""The manager's /metrics: endpoints, replicas, agents and proxies as they are, and its own work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import func, select

from dure.manager import schema
from dure.manager.controller import Controller
from dure.manager.fleet import Fleet
from dure.manager.hub import Hub
from dure.manager.model import ENDED, AgentStatus, EndpointStatus, ReplicaStatus
from dure.manager.observer import Observer
from dure.manager.store import Store
from dure.wire import VERSION
from dure.wire.prometheus import Page

# Endpoints that are shown one by one: those with the most replicas. The rest is only counted.
ENDPOINTS_MAX = 1_000


@dataclass(frozen=True)
class Stored:
    """What one look at the store tells."""

    endpoints: dict[str, int]
    replicas: dict[str, int]
    # Project, name, desired and ready replicas.
    largest: list[tuple[str, str, int, int]]


async def look(store: Store) -> Stored:
    living = (schema.Endpoint.deleted_ms.is_(None), schema.Endpoint.validation.is_(False))
    async with store.read() as session:
        endpoints = await session.execute(
            select(schema.Endpoint.status, func.count()).where(*living).group_by(schema.Endpoint.status)
        )
        replicas = await session.execute(
            select(schema.Replica.status, func.count())
            .where(schema.Replica.ended_ms.is_(None))
            .group_by(schema.Replica.status)
        )
        largest = await session.execute(
            select(
                schema.Project.name,
                schema.Endpoint.name,
                schema.Endpoint.desired_replicas,
                schema.Endpoint.ready_replicas,
            )
            .join(schema.Project, schema.Project.uid == schema.Endpoint.project_uid)
            .where(*living)
            .order_by(schema.Endpoint.desired_replicas.desc(), schema.Endpoint.uid)
            .limit(ENDPOINTS_MAX)
        )
        return Stored(
            {row[0]: row[1] for row in endpoints},
            {row[0]: row[1] for row in replicas},
            [(row[0], row[1], row[2], row[3]) for row in largest],
        )


async def render(store: Store, fleet: Fleet, hub: Hub, controller: Controller, observer: Observer) -> str:
    stored = await look(store)
    page = Page()
    page.gauges("dure_manager_info", "Always 1", [({"version": VERSION}, 1)])
    page.gauges(
        "dure_manager_endpoints",
        "Endpoints by status",
        [({"status": status.value}, stored.endpoints.get(status.value, 0)) for status in EndpointStatus],
    )
    page.gauges(
        "dure_manager_replicas",
        "Replicas that have not ended, by status",
        [({"status": s.value}, stored.replicas.get(s.value, 0)) for s in ReplicaStatus if s not in ENDED],
    )
    agents = list(fleet.statuses().values())
    page.gauges(
        "dure_manager_agents",
        "Agents by status",
        [({"status": status.value}, agents.count(status)) for status in AgentStatus],
    )
    groups = [proxy.group for proxy in hub.proxies.values()]
    page.gauges(
        "dure_manager_proxies_connected",
        "Proxies with an open stream, by proxy group",
        [({"proxy_group": group}, groups.count(group)) for group in _at_most(sorted(set(groups)))],
    )
    named = [({"project": project, "endpoint": name}, d, r) for project, name, d, r in stored.largest]
    page.gauges(
        "dure_manager_endpoint_desired_replicas",
        f"Replicas that an endpoint should have, of the {ENDPOINTS_MAX} endpoints with the most",
        [(labels, desired) for labels, desired, _ in named],
    )
    page.gauges(
        "dure_manager_endpoint_ready_replicas",
        "Replicas that take traffic, of the same endpoints",
        [(labels, ready) for labels, _, ready in named],
    )
    page.gauge("dure_manager_route_table_revision_number", "Newest revision of the route table", hub.revision)
    page.gauge("dure_manager_store_revision_number", "Newest revision of the store", store.revision)
    page.gauge("dure_manager_controller_queue", "Endpoints that wait for a run", controller.queue_length)
    page.histogram("dure_manager_controller_run_duration_seconds", "Runs of the controller", controller.runs)
    page.total(
        "dure_manager_controller_failed_runs_total", "Runs that failed and come again", controller.failed_runs
    )
    page.histogram("dure_manager_store_wait_seconds", "Waits of writers for their turn", store.waits)
    page.histogram("dure_manager_store_transaction_duration_seconds", "Writing transactions", store.turns)
    page.counter("dure_manager_api_calls_total", "Calls that ended, by method and code", observer.calls)
    page.histograms(
        "dure_manager_api_call_duration_seconds", "Calls of one request and one answer", observer.durations
    )
    page.gauges(
        "dure_manager_api_open_streams",
        "Calls under way that last: watches, logs, agents, proxies",
        [({"method": method}, count) for method, count in sorted(observer.open.items())],
    )
    return page.render()


def _at_most(names: Iterable[str]) -> list[str]:
    return list(names)[:ENDPOINTS_MAX]
