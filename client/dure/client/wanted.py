"""What the user of an endpoint may ask for, as keyword arguments of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Literal, TypedDict

from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint, ExtraMount, RolloutPolicy, ServiceOverride
from dure.wire.errors import InvalidInput, Violation

ClusterMode = Literal["single-node", "multi-node"]
CLUSTER_MODES: dict[str, endpoint_pb2.ClusterMode.ValueType] = {
    "single-node": endpoint_pb2.CLUSTER_MODE_SINGLE_NODE,
    "multi-node": endpoint_pb2.CLUSTER_MODE_MULTI_NODE,
}
PullPolicy = Literal["if-not-present", "always", "never"]
PULL_POLICIES: dict[str, endpoint_pb2.ImagePullPolicy.ValueType] = {
    "if-not-present": endpoint_pb2.IMAGE_PULL_POLICY_IF_NOT_PRESENT,
    "always": endpoint_pb2.IMAGE_PULL_POLICY_ALWAYS,
    "never": endpoint_pb2.IMAGE_PULL_POLICY_NEVER,
}
Profile = Literal["default", "strict"]
PROFILES: dict[str, endpoint_pb2.SecurityProfile.ValueType] = {
    "default": endpoint_pb2.SECURITY_PROFILE_DEFAULT,
    "strict": endpoint_pb2.SECURITY_PROFILE_STRICT,
}
# Fields whose value is a word of a table.
_WORDS: dict[str, Mapping[str, int]] = {
    "cluster_mode": CLUSTER_MODES,
    "image_pull_policy": PULL_POLICIES,
    "security_profile": PROFILES,
}


class EndpointFields(TypedDict, total=False):
    """What is left out is the manager's default in `create`, and stays as it is in `update`.

    In `update` a mapping, a list or a message replaces the whole one that was there; an empty one goes back
    to the default.
    """

    runtime: str
    model_mount_destination: str
    model_definition_path: str
    replicas: int
    open_to_public: bool
    resource_group: str
    resource_slots: Mapping[str, str]
    environ: Mapping[str, str]
    cluster_mode: ClusterMode
    cluster_size: int
    image: str
    architecture: str
    image_pull_policy: PullPolicy
    require_enforcement: str  # watchdog, hook, mps, mig; empty: any
    security_profile: Profile
    preset: str
    shared_memory: str
    priority: int
    extra_mounts: Sequence[ExtraMount]
    service: ServiceOverride
    rollout_policy: RolloutPolicy
    scale_to_zero_after: float | timedelta  # seconds; 0: never
    metrics_path: str


def endpoint_of(fields: EndpointFields) -> tuple[Endpoint, list[str]]:
    """The message with these fields, and the paths of a mask that names them. Raises InvalidInput."""
    wanted, paths = Endpoint(), []
    for key, value in fields.items():
        path = "replica_count" if key == "replicas" else key
        paths.append(path)
        if path in _WORDS:
            if value not in _WORDS[path]:
                raise InvalidInput.of(
                    [Violation(path, f"`{value}` is none of: {', '.join(sorted(_WORDS[path]))}")]
                )
            setattr(wanted, path, _WORDS[path][str(value)])
        elif path in ("resource_slots", "environ"):
            getattr(wanted, path).update(value)
        elif path == "extra_mounts":
            wanted.extra_mounts.extend(value)  # type: ignore[arg-type]
        elif path == "scale_to_zero_after":
            after_s = value.total_seconds() if isinstance(value, timedelta) else float(str(value))
            if after_s:
                wanted.scale_to_zero_after.FromNanoseconds(round(after_s * 1e9))
        elif path in ("service", "rollout_policy"):
            getattr(wanted, path).CopyFrom(value)
        else:
            setattr(wanted, path, value)
    return wanted, paths
