"""What the fake manager does with fields: canonical forms and revisions; and its rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from link.client.fake_state import FakeManager, page, refuses

from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint
from dure.wire.errors import FailedPrecondition, NotFound
from dure.wire.quantities import format_slot, parse_slots

SHAPELESS = (
    "replica_count", "open_to_public", "priority", "rollout_policy", "scale_to_zero_after", "metrics_path",
)  # fmt: skip


def canonical(endpoint: Endpoint, project: str) -> None:
    """Defaults filled in, amounts in one form: as the manager answers."""
    if "/" not in endpoint.model:
        endpoint.model = f"{project}/folders/{endpoint.model}"
    endpoint.runtime = endpoint.runtime or "custom"
    endpoint.model_mount_destination = endpoint.model_mount_destination or "/models"
    endpoint.resource_group = endpoint.resource_group or "default"
    endpoint.priority = endpoint.priority or 10
    endpoint.cluster_size = endpoint.cluster_size or 1
    endpoint.cluster_mode = endpoint.cluster_mode or endpoint_pb2.CLUSTER_MODE_SINGLE_NODE
    endpoint.image_pull_policy = endpoint.image_pull_policy or endpoint_pb2.IMAGE_PULL_POLICY_IF_NOT_PRESENT
    endpoint.security_profile = endpoint.security_profile or endpoint_pb2.SECURITY_PROFILE_DEFAULT
    slots = parse_slots(endpoint.resource_slots, "endpoint.resource_slots")
    for slot, milli in slots.items():
        endpoint.resource_slots[slot] = format_slot(slot, milli)
    for mount in endpoint.extra_mounts:
        mount.target = mount.target or f"/home/work/{mount.folder}"
    for field in ("service", "rollout_policy"):
        if endpoint.HasField(field) and not getattr(endpoint, field).ListFields():
            endpoint.ClearField(field)
    endpoint.resolved.Clear()
    endpoint.resolved.resource_slots.update({"cpu": "1", **endpoint.resource_slots})
    endpoint.resolved.environ.update(endpoint.environ)
    endpoint.resolved.port = endpoint.service.port or 8000
    endpoint.resolved.start_command.args.extend(["python", "serve.py"])


def shape(endpoint: Endpoint) -> Endpoint:
    """Only what shapes a replica."""
    kept = Endpoint()
    for field, _ in endpoint.ListFields():
        if 10 <= field.number < 50 and field.name not in SHAPELESS:
            _copy(endpoint, kept, field.name)
    return kept


def masked(current: Endpoint, wanted: Endpoint, paths: Iterable[str]) -> Endpoint:
    """What `current` is with the fields of `paths` taken from `wanted`."""
    result = Endpoint()
    result.CopyFrom(current)
    for path in paths:
        result.ClearField(path)  # type: ignore[arg-type]
        _copy(wanted, result, path)
    return result


def _copy(source: Endpoint, target: Endpoint, field: str) -> None:
    only = Endpoint()
    only.CopyFrom(source)
    for other, _ in source.ListFields():
        if other.name != field:
            only.ClearField(other.name)
    target.MergeFrom(only)


class Rollouts:
    """The part of EndpointService about revisions."""

    fake: FakeManager
    # Of the class that this is a part of.
    find: Callable[[str], Endpoint]

    def revise(self, endpoint: Endpoint, change: str) -> None:
        """Makes a revision of what the endpoint is now, and begins to roll it out."""
        revisions = self.fake.revisions.setdefault(endpoint.name, [])
        number = len(revisions) + 1
        revision = endpoint_pb2.Revision(
            name=f"{endpoint.name}/revisions/{number}",
            number=number,
            author="admin",
            change=change,
            state=endpoint_pb2.REVISION_STATE_ROLLING_OUT,
            spec=shape(endpoint),
            model_definition="models: []\n",
        )
        revision.create_time.GetCurrentTime()
        revisions.append(revision)
        self.roll_out(endpoint, number)

    def roll_out(self, endpoint: Endpoint, number: int) -> None:
        before, endpoint.revision = endpoint.revision, number
        if before:
            endpoint.rollout.Clear()
            endpoint.rollout.from_revision, endpoint.rollout.to_revision = before, number
            strategy = endpoint.rollout_policy.strategy or endpoint_pb2.ROLLOUT_STRATEGY_ROLLING
            endpoint.rollout.strategy = strategy
            endpoint.rollout.detail = "0 of 2 new replicas are healthy"
            endpoint.status = endpoint_pb2.ENDPOINT_STATUS_UPDATING

    @refuses
    async def ListRevisions(self, request: Any, context: Any) -> endpoint_pb2.ListRevisionsResponse:
        found = self.fake.revisions.get(self.find(request.parent).name, [])
        items, token = page(list(reversed(found)), request, self.fake)
        return endpoint_pb2.ListRevisionsResponse(revisions=items, next_page_token=token)

    @refuses
    async def RollbackEndpoint(self, request: Any, context: Any) -> endpoint_pb2.RollbackEndpointResponse:
        self.fake.called("RollbackEndpoint")
        endpoint = self.find(request.name)
        number = request.revision or endpoint.revision - 1
        revisions = self.fake.revisions.get(endpoint.name, [])
        if not 1 <= number <= len(revisions):
            raise NotFound(f"there is no revision {number} to go back to")
        wanted = revisions[number - 1].spec
        fields = [field.name for field in wanted.DESCRIPTOR.fields if 10 <= field.number < 50]
        back = masked(endpoint, wanted, [field for field in fields if field not in SHAPELESS])
        endpoint.CopyFrom(back)
        self.roll_out(endpoint, number)
        self.fake.touch(endpoint.name)
        return endpoint_pb2.RollbackEndpointResponse(endpoint=endpoint)

    @refuses
    async def PauseRollout(self, request: Any, context: Any) -> endpoint_pb2.PauseRolloutResponse:
        endpoint = self._rolling(request.name)
        endpoint.rollout.paused = True
        self.fake.touch(endpoint.name)
        return endpoint_pb2.PauseRolloutResponse(endpoint=endpoint)

    @refuses
    async def ResumeRollout(self, request: Any, context: Any) -> endpoint_pb2.ResumeRolloutResponse:
        endpoint = self._rolling(request.name)
        endpoint.rollout.paused = endpoint.rollout.waits = False
        if request.full:
            endpoint.rollout.weight = 100
        self.fake.touch(endpoint.name)
        return endpoint_pb2.ResumeRolloutResponse(endpoint=endpoint)

    def _rolling(self, name: str) -> Endpoint:
        endpoint = self.find(name)
        if not endpoint.HasField("rollout"):
            raise FailedPrecondition("no rollout goes on")
        return endpoint
