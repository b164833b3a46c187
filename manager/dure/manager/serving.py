"""Who takes requests, and how they are split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dure.manager import rollout
from dure.manager.model import EndpointView, ReplicaStatus, ReplicaView


def in_route(replica: ReplicaView) -> bool:
    """Whether a replica takes new requests."""
    return replica.status is ReplicaStatus.HEALTHY and not replica.draining


def serving_by_revision(replicas: Sequence[ReplicaView]) -> dict[int, int]:
    """How many replicas of each revision take new requests."""
    counts: dict[int, int] = {}
    for replica in replicas:
        if in_route(replica):
            counts[replica.revision] = counts.get(replica.revision, 0) + 1
    return counts


def traffic(endpoint: EndpointView, replicas: Sequence[ReplicaView]) -> Mapping[int, int]:
    """Percent of the requests by revision, as the stored state of a rollout says; empty: all alike."""
    state = endpoint.rollout
    if state is None or state.revision != endpoint.revision:
        # A rollout that has not begun yet must not show its revision to anybody.
        state = rollout.begin(endpoint, 0)
    serving = serving_by_revision(replicas)
    if state is None:
        return rollout.pools_back(endpoint.policy, serving, endpoint.revision, endpoint.desired)
    return rollout.pools(state, endpoint.policy, serving, endpoint.desired)
