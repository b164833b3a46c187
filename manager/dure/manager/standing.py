"""An endpoint's status, the first that holds, with a sentence for people."""

from __future__ import annotations

from collections.abc import Sequence

from dure.manager import rollout
from dure.manager.model import EndpointStatus, EndpointView, ReplicaStatus, ReplicaView, Surroundings
from dure.manager.plan import Plan, backoff_ms
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
    last = f"; last error: {errors[-1]}" if errors else ""
    if endpoint.deleting:
        left = leaving + around.lingering
        return E.TERMINATING, f"{left} replica(s) are still draining or stopping" if left else ""
    if plan.blocked:
        return E.BLOCKED, (
            f"{len(errors)} replicas in a row failed before they became healthy{last}; "
            f"mend the cause, then run: dure endpoint retry {endpoint.name}"
        )
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
        wait_s = max(0.0, (plan.failed_ms + backoff_ms(plan.failures) - around.now_ms) / 1000)
        next_start = f"the next start is in {wait_s:.0f} s{last}" if not staying else ""
        return E.UNHEALTHY, next_start or staying[0].reason or "no replica is healthy"
    parts = [f"{len(healthy)} of {endpoint.desired} healthy"]
    if starting:
        parts.append(f"{len(starting)} starting")
    if pending:
        parts.append(f"{len(pending)} waiting for a place: {pending[0].reason or 'not tried yet'}")
    if plan.failures and not plan.create and len(staying) < endpoint.desired:
        wait_s = max(0.0, (plan.failed_ms + backoff_ms(plan.failures) - around.now_ms) / 1000)
        parts.append(f"next start in {wait_s:.0f} s{last}")
    return E.DEGRADED, ", ".join(parts)
