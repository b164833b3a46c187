"""The route of an endpoint: what proxies forward by, derived from its replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dure.manager.model import EndpointStatus, KernelView, ReplicaView
from dure.manager.serving import in_route
from dure.routing.v1 import routing_pb2

_UNAVAILABLE = {
    EndpointStatus.BLOCKED: routing_pb2.UNAVAILABILITY_BLOCKED,
    EndpointStatus.STOPPED: routing_pb2.UNAVAILABILITY_STOPPED,
    EndpointStatus.IDLE: routing_pb2.UNAVAILABILITY_IDLE,
    EndpointStatus.TERMINATING: routing_pb2.UNAVAILABILITY_TERMINATING,
    EndpointStatus.UNHEALTHY: routing_pb2.UNAVAILABILITY_UNHEALTHY,
}


HOLD_MS = 60_000
_HOPELESS = frozenset({EndpointStatus.BLOCKED, EndpointStatus.STOPPED, EndpointStatus.TERMINATING})


def route(
    *,
    uid: str,
    project: str,
    name: str,
    port: int,
    label: str,
    open_to_public: bool,
    status: EndpointStatus,
    replicas: Sequence[ReplicaView],
    pools: Mapping[int, int],
    revoked_tokens: Sequence[str],
    hold: bool = False,
    scrape: routing_pb2.ScrapeSettings | None = None,
) -> routing_pb2.Route:
    """Equal inputs give equal messages, so that an unchanged route is not published again."""
    result = routing_pb2.Route(
        endpoint_uid=uid,
        project=project,
        endpoint=name,
        port=port,
        label=label,
        open_to_public=open_to_public,
        revoked_tokens=sorted(revoked_tokens),
        scrape=scrape,
        # Requests that wake an endpoint wait for it, unless it is clear that it will not come.
        hold_ms=HOLD_MS if hold and status not in _HOPELESS else 0,
    )
    for replica in sorted(replicas, key=lambda replica: replica.uid):
        kernel = _reachable(replica)
        if kernel is None or not (in_route(replica) or replica.draining):
            continue
        result.targets.add(
            replica_uid=replica.uid,
            host=kernel.host,
            port=kernel.port,
            weight=1,
            draining=replica.draining,
            revision=replica.revision,
        )
    for revision, weight in sorted(pools.items()):
        result.pools.add(revision=revision, weight=weight)
    if not any(not target.draining for target in result.targets):
        result.unavailability = _UNAVAILABLE.get(status, routing_pb2.UNAVAILABILITY_STARTING)
        # Only what its callers may see: nodes and log lines are for the owner.
        result.unavailability_detail = _FOR_CALLERS[result.unavailability]
    return result


_FOR_CALLERS = {
    routing_pb2.UNAVAILABILITY_STARTING: "no replica is healthy yet; replicas are starting",
    routing_pb2.UNAVAILABILITY_UNHEALTHY: "no replica is healthy",
    routing_pb2.UNAVAILABILITY_BLOCKED: "replicas failed too often; the owner of this endpoint must act",
    routing_pb2.UNAVAILABILITY_IDLE: "nothing runs now; this request starts a replica",
    routing_pb2.UNAVAILABILITY_STOPPED: "the owner of this endpoint has stopped it",
    routing_pb2.UNAVAILABILITY_TERMINATING: "this endpoint is being removed",
}


def _reachable(replica: ReplicaView) -> KernelView | None:
    main = replica.kernels[0] if replica.kernels else None
    return main if main is not None and main.port and main.wanted else None


def host_label(name: str, uid: str) -> str:
    """Host label in subdomain mode: unique over all projects, fixed for the endpoint's life."""
    return f"{name[:50]}-{uid.replace('-', '')[-6:]}"
