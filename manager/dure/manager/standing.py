"""An endpoint's status, the first that holds, with a sentence for people."""

from __future__ import annotations

from collections.abc import Sequence

from dure.manager import rollout
from dure.manager.model import EndpointStatus, EndpointView, ReplicaStatus, ReplicaView, Surroundings
from dure.manager.plan import Plan
from dure.manager.serving import in_route, serving_by_revision

_STARTING = (ReplicaStatus.STARTING, ReplicaStatus.DEGRADED)


def standing(
    endpoint: EndpointView, replicas: Sequence[ReplicaView], around: Surroundings, plan: Plan
) -> tuple[EndpointStatus, str]:
    """The first that holds, with a sentence."""
    E = EndpointStatus
    staying = [replica for replica in replicas if not replica.leaving]
    leaving = len(replicas) - len(staying)
    healthy = [replica for replica in staying if in_route(replica)]
    pending = [replica for replica in staying if replica.status is ReplicaStatus.PENDING]
    starting = [
        replica for replica in staying if replica.status in (ReplicaStatus.STARTING, ReplicaStatus.DEGRADED)
    ]
    errors = ([] if plan.clear_errors else list(endpoint.errors)) + plan.errors
    newest = plan.last_error if plan.next_start_ms else errors[-1] if errors else ""
    last = f"; last error: {newest}" if newest else ""
    if endpoint.deleting:
        left = leaving + around.lingering
        return E.TERMINATING, f"{left} replica(s) are still draining or stopping" if left else ""
    if plan.blocked:
        how = f"{len(errors)} replicas in a row failed before they became healthy"
        if plan.evictions:
            how = f"{len(errors)} replicas in a row failed or were ended by their nodes"
        return E.BLOCKED, f"{how}{last}; mend the cause, then run: dure endpoint retry {endpoint.name}"
    if endpoint.desired == 0:
        if endpoint.idle:
            return E.IDLE, "the autoscaler went to zero; the next request wakes it"
        return E.STOPPED, "zero replicas are wanted"
    old = [replica for replica in staying if replica.revision != endpoint.revision]
    if plan.rollout is not None:
        serving = serving_by_revision(staying)
        where = rollout.detail(plan.rollout, endpoint.policy, endpoint.name, serving, endpoint.desired)
        waiting = next((f"; waiting for a place: {replica.reason}" for replica in pending), "")
        return E.UPDATING, where + waiting + last
    if old:
        return E.UPDATING, f"revision {endpoint.revision} replaces {len(old)} replica(s) of others"
    if len(healthy) >= endpoint.desired:
        if around.published:
            return E.HEALTHY, ""
        return E.DEGRADED, "the proxies are taking up the route"
    if pending and not starting and not healthy:
        return E.PENDING, pending[0].reason or "waiting for a place"
    if not healthy and not starting:
        if plan.create:
            return E.PENDING, f"{sum(plan.create.values())} replica(s) are being placed{last}"
        next_start = f"the next start is in {_wait_s(plan, around):.0f} s{last}" if not staying else ""
        return E.UNHEALTHY, next_start or staying[0].reason or "no replica is healthy"
    parts = [f"{len(healthy)} of {endpoint.desired} healthy"]
    if starting:
        parts.append(f"{len(starting)} starting")
    if pending:
        parts.append(f"{len(pending)} waiting for a place: {pending[0].reason or 'not tried yet'}")
    if plan.next_start_ms and not plan.create and len(staying) < endpoint.desired:
        parts.append(f"next start in {_wait_s(plan, around):.0f} s")
    return E.DEGRADED, ", ".join(parts) + (last if plan.next_start_ms else "")


def _wait_s(plan: Plan, around: Surroundings) -> float:
    return max(0.0, (plan.next_start_ms - around.now_ms) / 1000)
