"""When is a wait for an endpoint over? A pure decision."""

from __future__ import annotations

from dataclasses import dataclass

from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint, EndpointStatus

_SERVED_OUT = (endpoint_pb2.REPLICA_STATUS_TERMINATED, endpoint_pb2.REPLICA_STATUS_FAILED)


@dataclass(frozen=True)
class Verdict:
    """`done`, or `failed` with a sentence for people, or (neither) wait on."""

    done: bool = False
    failed: str = ""


def judge(endpoint: Endpoint) -> Verdict:
    """Whether `endpoint` is as its user wants it, or cannot get there by itself.

    As wanted means: HEALTHY with exactly the replicas that the manager wants to keep and none that is still
    being drained; or, where zero are wanted, none left.
    """
    status = endpoint.status
    name = endpoint.name.rsplit("/", 1)[-1]
    if status == endpoint_pb2.ENDPOINT_STATUS_BLOCKED:
        return Verdict(failed=f"endpoint {name} is BLOCKED: {_why(endpoint)}")
    if status == endpoint_pb2.ENDPOINT_STATUS_TERMINATING:
        return Verdict(failed=f"endpoint {name} is being deleted")
    living = [replica for replica in endpoint.replicas if replica.status not in _SERVED_OUT]
    if status in (endpoint_pb2.ENDPOINT_STATUS_STOPPED, endpoint_pb2.ENDPOINT_STATUS_IDLE):
        return Verdict(done=not living)
    if status != endpoint_pb2.ENDPOINT_STATUS_HEALTHY or endpoint.ready_replicas != endpoint.desired_replicas:
        return Verdict()
    return Verdict(done=len(living) == endpoint.desired_replicas)


def summary(endpoint: Endpoint) -> str:
    """`DEGRADED, 1 of 2 ready: waiting for ...`."""
    status = EndpointStatus.Name(endpoint.status).removeprefix("ENDPOINT_STATUS_")
    text = f"{status}, {endpoint.ready_replicas} of {endpoint.desired_replicas} ready"
    if endpoint.status_reason and endpoint.status != endpoint_pb2.ENDPOINT_STATUS_HEALTHY:
        text += f": {endpoint.status_reason}"
    return text


def _why(endpoint: Endpoint) -> str:
    return endpoint.status_reason or (
        endpoint.errors[-1] if endpoint.errors else "too many failures in a row"
    )
