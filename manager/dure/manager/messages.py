"""Rows as messages of the public API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf import json_format, timestamp_pb2

from dure.definitions.problems import Problem
from dure.fleet.v1 import fleet_pb2
from dure.manager import rollout, schema
from dure.manager.model import EndpointView, KernelHealth, RolloutState
from dure.v1 import endpoint_pb2, folder_pb2
from dure.wire import enforcement, names
from dure.wire.quantities import format_slot

_HEALTH = {
    KernelHealth.UNKNOWN: endpoint_pb2.HEALTH_UNKNOWN,
    KernelHealth.DEGRADED: endpoint_pb2.HEALTH_DEGRADED,
    KernelHealth.HEALTHY: endpoint_pb2.HEALTH_HEALTHY,
    KernelHealth.UNHEALTHY: endpoint_pb2.HEALTH_UNHEALTHY,
}


def timestamp(milliseconds: int) -> timestamp_pb2.Timestamp:
    result = timestamp_pb2.Timestamp()
    result.FromMilliseconds(milliseconds)
    return result


def endpoint(
    row: schema.Endpoint,
    project: str,
    revision: schema.Revision,
    replicas: Iterable[endpoint_pb2.Replica] = (),
) -> endpoint_pb2.Endpoint:
    message = shaping(revision, project)
    message.MergeFrom(
        endpoint_pb2.Endpoint(
            name=names.endpoint(project, row.name),
            uid=row.uid,
            etag=row.etag,
            create_time=timestamp(row.created_ms),
            update_time=timestamp(row.updated_ms),
            replica_count=row.replica_count,
            open_to_public=row.open_to_public,
            priority=row.priority,
            status=endpoint_pb2.EndpointStatus.Value(f"ENDPOINT_STATUS_{row.status}"),
            status_reason=row.status_reason,
            address=row.address,
            revision=row.revision,
            stable_revision=row.stable_revision,
            desired_replicas=row.desired_replicas,
            ready_replicas=row.ready_replicas,
            replicas=replicas,
            errors=row.errors,
        )
    )
    json_format.ParseDict(revision.spec["resolved"], message.resolved)
    json_format.ParseDict(row.rollout_policy, message.rollout_policy)
    message.metrics_path = row.metrics_path
    if row.scale_to_zero_ms:
        message.scale_to_zero_after.FromMilliseconds(row.scale_to_zero_ms)
    for condition in row.conditions:
        message.conditions.add(type=condition["type"], message=condition["message"])
    return message


def shaping(revision: schema.Revision, project: str) -> endpoint_pb2.Endpoint:
    """What was asked for in a revision: the fields that shape a replica."""
    message = json_format.ParseDict(revision.spec["asked"], endpoint_pb2.Endpoint())
    message.model = names.folder(project, revision.spec["folder"])
    # Not stored where they are what they are by default.
    message.image_pull_policy = message.image_pull_policy or endpoint_pb2.IMAGE_PULL_POLICY_IF_NOT_PRESENT
    message.security_profile = message.security_profile or endpoint_pb2.SECURITY_PROFILE_DEFAULT
    return message


def rollout_of(
    endpoint: EndpointView, state: RolloutState, serving: Mapping[int, int]
) -> endpoint_pb2.Rollout:
    """A rollout that goes on; `serving` counts the replicas of each revision that take requests."""
    policy = endpoint.policy
    return endpoint_pb2.Rollout(
        from_revision=endpoint.stable,
        to_revision=state.revision,
        strategy=endpoint_pb2.RolloutStrategy.Value(f"ROLLOUT_STRATEGY_{policy.strategy}"),
        paused=state.paused,
        waits=rollout.waits(state, policy),
        step=rollout.canary_step(state, policy),
        weight=rollout.weight(state, policy, serving, endpoint.desired),
        detail=rollout.detail(state, policy, endpoint.name, serving, endpoint.desired),
    )


def revision(row: schema.Revision, endpoint: schema.Endpoint, project: str) -> endpoint_pb2.Revision:
    spec = shaping(row, project)
    return endpoint_pb2.Revision(
        name=names.revision(project, endpoint.name, row.number),
        number=row.number,
        create_time=timestamp(row.created_ms),
        author=row.author,
        change=row.change,
        state=_revision_state(row, endpoint),
        reason=row.failed,
        spec=spec,
        model_definition=row.definition,
    )


def _revision_state(row: schema.Revision, endpoint: schema.Endpoint) -> endpoint_pb2.RevisionState.ValueType:
    if row.failed:
        return endpoint_pb2.REVISION_STATE_FAILED
    if row.number == endpoint.stable_revision:
        return endpoint_pb2.REVISION_STATE_CURRENT
    if row.number == endpoint.revision:
        return endpoint_pb2.REVISION_STATE_ROLLING_OUT
    return endpoint_pb2.REVISION_STATE_REPLACED


def replica(
    row: schema.Replica,
    kernels: Iterable[schema.Kernel],
    agent_names: Mapping[str, str],
    project: str,
    endpoint_name: str,
) -> endpoint_pb2.Replica:
    message = endpoint_pb2.Replica(
        name=names.replica(project, endpoint_name, row.uid),
        uid=row.uid,
        revision=row.revision,
        status=endpoint_pb2.ReplicaStatus.Value(f"REPLICA_STATUS_{row.status}"),
        health=endpoint_pb2.HEALTH_UNKNOWN,
        reason=row.reason,
        create_time=timestamp(row.created_ms),
    )
    ordered = sorted(kernels, key=lambda kernel: (kernel.role, kernel.index))
    for kernel in ordered:
        status = fleet_pb2.KernelStatus.FromString(kernel.status)
        shown = message.kernels.add(
            host=f"{kernel.role}{kernel.index}",
            uid=kernel.uid,
            node=agent_names.get(kernel.agent_uid, kernel.agent_uid),
            pid=status.pid,
            message=status.message,
            enforcement=status.enforcement,
            enforcement_detail=status.enforcement_detail,
            security_profile=(
                endpoint_pb2.SECURITY_PROFILE_STRICT
                if kernel.strict
                else endpoint_pb2.SECURITY_PROFILE_DEFAULT
            ),
        )
        for share in kernel.devices:
            amount = format_slot(share["slot"], share["amount"])
            shown.devices.add(device=share["device"], slot=share["slot"], amount=amount)
        message.devices.extend(shown.devices)
    message.enforcement = enforcement.least(k.enforcement for k in message.kernels if k.devices)
    if ordered:
        main = ordered[0]
        status = fleet_pb2.KernelStatus.FromString(main.status)
        message.session = row.session_uid
        message.node = agent_names.get(main.agent_uid, main.agent_uid)
        message.health = _HEALTH[KernelHealth(main.health)]
        message.pid = status.pid
        if status.port:
            host = f"[{status.host}]" if ":" in status.host else status.host
            message.target = f"{host}:{status.port}"
        message.probe.consecutive_failures = status.consecutive_failures
        message.probe.status_code = status.probe_status_code
        message.probe.detail = status.probe_detail
        if status.HasField("exit") and status.exit.code >= 0:
            message.exit_code = status.exit.code
    return message


def folder(row: schema.Folder, project: str, file_count: int, size_bytes: int) -> folder_pb2.Folder:
    return folder_pb2.Folder(
        name=names.folder(project, row.name),
        uid=row.uid,
        usage=folder_pb2.FolderUsage.Value(f"FOLDER_USAGE_{row.usage}"),
        create_time=timestamp(row.created_ms),
        file_count=file_count,
        size_bytes=size_bytes,
    )


def file_problem(problem: Problem) -> folder_pb2.FileProblem:
    return folder_pb2.FileProblem(
        file=problem.file, line=problem.line, key=problem.key, message=problem.message
    )


def event(row: schema.Event, project: str, endpoint_name: str) -> endpoint_pb2.Event:
    return endpoint_pb2.Event(
        name=names.event(project, endpoint_name, row.uid),
        time=timestamp(row.time_ms),
        reason=row.reason,
        message=row.message,
        replica=row.replica_uid,
        warning=row.warning,
    )
