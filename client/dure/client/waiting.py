"""When is a wait for an endpoint over? A pure decision."""

from __future__ import annotations

from dataclasses import dataclass

from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint, EndpointStatus, Rollout, RolloutStrategy

_SERVED_OUT = (endpoint_pb2.REPLICA_STATUS_TERMINATED, endpoint_pb2.REPLICA_STATUS_FAILED)
_AT_ZERO = (endpoint_pb2.ENDPOINT_STATUS_STOPPED, endpoint_pb2.ENDPOINT_STATUS_IDLE)


@dataclass(frozen=True)
class Verdict:
    """`done`, or `failed` with a sentence for people and a stable `reason`, or (neither) wait on."""

    done: bool = False
    failed: str = ""
    reason: str = "WAIT_FAILED"


def judge(endpoint: Endpoint, revision: int | None = None) -> Verdict:
    """Whether `endpoint` is as its user wants it, or cannot get there by itself.

    As wanted means: HEALTHY with exactly the replicas that the manager wants to keep, none that is still
    being drained, and no rollout that goes on; or, where zero are wanted, none left. With a `revision` all
    replicas must run it; a rollout of it that is the user's to go on with is done, too.
    """
    status = endpoint.status
    name = endpoint.name.rsplit("/", 1)[-1]
    if status == endpoint_pb2.ENDPOINT_STATUS_BLOCKED:
        return Verdict(failed=f"endpoint {name} is BLOCKED: {_why(endpoint)}")
    if status == endpoint_pb2.ENDPOINT_STATUS_TERMINATING:
        return Verdict(failed=f"endpoint {name} is being deleted")
    if revision is not None and endpoint.revision != revision:
        return Verdict(
            failed=f"revision {revision} of endpoint {name} was not kept; now it is {endpoint.revision}",
            reason="ROLLED_BACK",
        )
    if endpoint.HasField("rollout") and status not in _AT_ZERO:
        return _judge_rollout(name, endpoint.rollout, ends_when_it_waits=revision is not None)
    living = [replica for replica in endpoint.replicas if replica.status not in _SERVED_OUT]
    if status in _AT_ZERO:
        return Verdict(done=not living)
    if status != endpoint_pb2.ENDPOINT_STATUS_HEALTHY or endpoint.ready_replicas != endpoint.desired_replicas:
        return Verdict()
    if revision is not None and any(replica.revision != revision for replica in living):
        return Verdict()
    return Verdict(done=len(living) == endpoint.desired_replicas)


def _judge_rollout(name: str, rollout: Rollout, *, ends_when_it_waits: bool) -> Verdict:
    if rollout.paused:
        detail = rollout.detail and f": {rollout.detail}"
        return Verdict(failed=f"the rollout of endpoint {name} is paused{detail}", reason="ROLLOUT_PAUSED")
    if rollout.waits and not ends_when_it_waits:
        detail = rollout_summary(rollout)
        return Verdict(failed=f"endpoint {name} does not go on by itself: {detail}", reason="ROLLOUT_WAITS")
    return Verdict(done=rollout.waits)


def summary(endpoint: Endpoint) -> str:
    """`DEGRADED, 1 of 2 ready: waiting for ...`."""
    status = EndpointStatus.Name(endpoint.status).removeprefix("ENDPOINT_STATUS_")
    text = f"{status}, {endpoint.ready_replicas} of {endpoint.desired_replicas} ready"
    if endpoint.HasField("rollout"):
        text += f", {rollout_summary(endpoint.rollout)}"
    if endpoint.status_reason and endpoint.status != endpoint_pb2.ENDPOINT_STATUS_HEALTHY:
        text += f": {endpoint.status_reason}"
    return text


def rollout_summary(rollout: Rollout) -> str:
    """`revision 2 -> 3, canary, 10% of the requests, waits to be promoted`; its detail says more."""
    strategy = RolloutStrategy.Name(rollout.strategy).removeprefix("ROLLOUT_STRATEGY_").lower()
    text = f"revision {rollout.from_revision or 'none'} -> {rollout.to_revision}, "
    text += f"{strategy.replace('_', '-')}, {rollout.weight}% of the requests"
    if rollout.paused:
        text += ", paused"
    elif rollout.waits:
        text += ", waits to be promoted"
    return text


def _why(endpoint: Endpoint) -> str:
    return endpoint.status_reason or (
        endpoint.errors[-1] if endpoint.errors else "too many failures in a row"
    )
