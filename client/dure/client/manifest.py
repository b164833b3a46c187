"""What the user of an endpoint asked for, as the plain values of a file for `dure apply`. Pure.

What is as it would be without being said is left out, so that two endpoints that were asked for in
different words have the same values. `manifest_reader.py` is the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dure.client.notation import (
    amount,
    command_text,
    duration_text,
    mount_source,
    mount_target,
    steps_text,
)
from dure.client.rule_notation import rule_values
from dure.client.wanted import CLUSTER_MODES, PROFILES, PULL_POLICIES
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import (
    Endpoint,
    HealthCheckOverride,
    RolloutPolicy,
    RolloutStrategy,
    ServiceOverride,
)
from dure.v1.scaling_pb2 import ScalingRule
from dure.wire.quantities import MEM

STRATEGIES: dict[str, RolloutStrategy.ValueType] = {
    "rolling": endpoint_pb2.ROLLOUT_STRATEGY_ROLLING,
    "blue-green": endpoint_pb2.ROLLOUT_STRATEGY_BLUE_GREEN,
    "canary": endpoint_pb2.ROLLOUT_STRATEGY_CANARY,
}
_DEFAULTS: Mapping[str, Any] = {
    "runtime": "custom",
    "model_mount_destination": "/models",
    "resource_group": "default",
    "image_pull_policy": "if-not-present",
    "security_profile": "default",
    "cluster_mode": "single-node",
    "cluster_size": 1,
    "priority": 10,
    "open_to_public": False,
    "metrics_path": "/metrics",
}
_ROLLOUT_DEFAULTS: Mapping[str, Any] = {
    "strategy": "rolling",
    "max_surge": "1",
    "max_unavailable": "0",
    "progress_deadline": "600s",
    "manual_switch": False,
    "no_automatic_rollback": False,
}


@dataclass(frozen=True)
class Change:
    """One value that differs; None: not there, so the default."""

    path: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.before is None:
            return f"+ {self.path}: {self.after}"
        if self.after is None:
            return f"- {self.path}: {self.before}"
        return f"~ {self.path}: {self.before} -> {self.after}"


def to_manifest(endpoint: Endpoint, rules: Sequence[ScalingRule] = ()) -> dict[str, Any]:
    """The values of a file that asks for `endpoint` and its rules, in the order that the document has."""
    modes = {number: word for word, number in CLUSTER_MODES.items()}
    policies = {number: word for word, number in PULL_POLICIES.items()}
    profiles = {number: word for word, number in PROFILES.items()}
    values: dict[str, Any] = {
        "name": endpoint.name.rsplit("/", 1)[-1],
        "model": endpoint.model.rsplit("/", 1)[-1],
        "runtime": endpoint.runtime,
        "replicas": endpoint.replica_count,
        "open_to_public": endpoint.open_to_public,
        "resource_group": endpoint.resource_group,
        "preset": endpoint.preset,
        "resource_slots": {
            slot: amount(slot, endpoint.resource_slots[slot]) for slot in sorted(endpoint.resource_slots)
        },
        "shared_memory": amount(MEM, endpoint.shared_memory),
        "environ": {key: endpoint.environ[key] for key in sorted(endpoint.environ)},
        "image": endpoint.image,
        "architecture": endpoint.architecture,
        "image_pull_policy": policies.get(endpoint.image_pull_policy, ""),
        "security_profile": profiles.get(endpoint.security_profile, ""),
        "require_enforcement": endpoint.require_enforcement,
        "model_mount_destination": endpoint.model_mount_destination,
        "model_definition_path": endpoint.model_definition_path,
        "extra_mounts": [_mount(mount) for mount in endpoint.extra_mounts],
        "cluster_mode": modes.get(endpoint.cluster_mode, ""),
        "cluster_size": endpoint.cluster_size,
        "priority": endpoint.priority,
        "service": _service(endpoint.service),
        "rollout": _rollout(endpoint.rollout_policy),
        "scale_to_zero_after": duration_text(endpoint.scale_to_zero_after)
        if endpoint.scale_to_zero_after.ToNanoseconds()
        else "",
        "metrics_path": endpoint.metrics_path,
        "scaling": [rule_values(rule) for rule in rules],
    }
    always = ("name", "model", "replicas")
    return {
        key: value
        for key, value in values.items()
        if key in always or (value and value != _DEFAULTS.get(key))
    }


def changes(before: Endpoint | None, after: Endpoint) -> list[Change]:
    """What differs in what was asked for, in the order of a manifest; everything without a `before`."""
    old = _flat(before) if before is not None else {}
    new = _flat(after)
    paths = [*new, *(path for path in old if path not in new)]
    return [Change(path, old.get(path), new.get(path)) for path in paths if old.get(path) != new.get(path)]


def differs(before: Endpoint | None, after: Endpoint) -> bool:
    """Whether a change from one to the other does anything."""
    return before is None or before.revision != after.revision or bool(changes(before, after))


def _flat(endpoint: Endpoint) -> dict[str, str]:
    """Path to text. Lists are one value each, but for mounts: those have a path by their target."""
    values = to_manifest(endpoint)
    del values["name"]
    values.pop("extra_mounts", None)
    flat: dict[str, str] = {}
    for key, value in values.items():
        _flatten(key, value, flat)
    if endpoint.HasField("service") and endpoint.service.HasField("start_command"):
        flat["service.start_command"] = command_text(endpoint.service.start_command)
    if "rollout.steps" in flat:
        flat["rollout.steps"] = steps_text(list(endpoint.rollout_policy.steps))
    for mount in endpoint.extra_mounts:
        access = "writable" if mount.writable else "read-only"
        flat[f"extra_mounts[{mount_target(mount)}]"] = f"{mount_source(mount)}, {access}"
    return flat


def _flatten(path: str, value: Any, flat: dict[str, str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{path}.{key}", inner, flat)
    elif isinstance(value, bool):
        flat[path] = "true" if value else "false"
    else:
        flat[path] = str(value)


def _mount(mount: endpoint_pb2.ExtraMount) -> dict[str, Any]:
    values: dict[str, Any] = {"folder": mount.folder.rsplit("/", 1)[-1]}
    if mount_target(mount) != f"/home/work/{values['folder']}":
        values["target"] = mount.target
    if mount.subpath:
        values["subpath"] = mount.subpath
    if mount.writable:
        values["writable"] = True
    return values


def _service(service: ServiceOverride) -> dict[str, Any]:
    values: dict[str, Any] = {}
    command = service.start_command
    if command.args:
        values["start_command"] = list(command.args)
    elif command.line:
        values["start_command"] = command.line
        if command.shell not in ("", "/bin/bash"):
            values["shell"] = command.shell
    if service.port:
        values["port"] = service.port
    if service.HasField("health_check"):
        check = _health_check(service.health_check)
        if check is False or check:
            values["health_check"] = check
    return values


def _health_check(check: HealthCheckOverride) -> dict[str, Any] | bool:
    if check.disabled:
        return False
    values: dict[str, Any] = {}
    for field, value in check.ListFields():
        if field.name != "disabled":
            values[field.name] = duration_text(value) if field.message_type is not None else value
    return values


def _rollout(policy: RolloutPolicy) -> dict[str, Any]:
    words = {number: word for word, number in STRATEGIES.items()}
    values: dict[str, Any] = {
        "strategy": words.get(policy.strategy, ""),
        "max_surge": policy.max_surge,
        "max_unavailable": policy.max_unavailable,
        "progress_deadline": duration_text(policy.progress_deadline)
        if policy.HasField("progress_deadline")
        else "",
        "steps": [
            {"weight": step.weight} | ({"hold": duration_text(step.hold)} if step.HasField("hold") else {})
            for step in policy.steps
        ],
        "manual_switch": policy.manual_switch,
        "no_automatic_rollback": policy.no_automatic_rollback,
    }
    return {key: value for key, value in values.items() if value and value != _ROLLOUT_DEFAULTS.get(key)}
