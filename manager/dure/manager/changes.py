"""What changes between two wanted states of an endpoint: masks applied, differences told.

Only what users ask for (fields 10 to 49 of Endpoint) is looked at.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import duration_pb2, json_format
from google.protobuf.message import Message

from dure.manager import asked
from dure.v1 import endpoint_pb2
from dure.wire.errors import InvalidInput, Violation

_FIELDS = [field for field in endpoint_pb2.Endpoint.DESCRIPTOR.fields if 10 <= field.number < 50]
ASKED = tuple(field.name for field in _FIELDS)
# What shapes no replica: a change of it makes no new revision.
UNSHAPED = (
    "replica_count", "open_to_public", "priority", "rollout_policy", "scale_to_zero_after", "metrics_path",
)  # fmt: skip
UPDATABLE = tuple(name for name in ASKED if name != "model")
_NANOSECONDS_MAX = 10**9 * 10**9
_MAPS = ("resource_slots", "environ")
CHARACTERS_MAX = 60


def apply_mask(
    current: endpoint_pb2.Endpoint, wanted: endpoint_pb2.Endpoint, paths: Sequence[str]
) -> endpoint_pb2.Endpoint:
    """What is wanted now: `current` with the fields of `wanted` that `paths` name.

    A path is a field, or goes on into a message (`service.port`) or a map (`environ.MODE`,
    `resource_slots.cuda.shares`); a key that `wanted` does not have is removed. Raises InvalidInput with
    every path that cannot be changed.
    """
    result = endpoint_pb2.Endpoint()
    result.CopyFrom(current)
    violations = []
    if not paths:
        violations.append(Violation("update_mask", f"is required; name some of {', '.join(UPDATABLE)}"))
    for index, path in enumerate(paths):
        first = path.split(".")[0]
        wrong = ""
        if first not in UPDATABLE:
            near = difflib.get_close_matches(first, UPDATABLE, n=1, cutoff=0.6)
            hint = f"did you mean `{near[0]}`?" if near else f"those that can are {', '.join(UPDATABLE)}"
            wrong = f"`{path[:CHARACTERS_MAX]}` cannot be changed; {hint}"
        elif not _copy(result, wanted, path):
            wrong = f"`{path[:CHARACTERS_MAX]}` leads to no field"
        if wrong:
            violations.append(Violation(f"update_mask.paths[{index}]", wrong))
    if violations:
        raise InvalidInput.of(violations)
    return result


def describe_changes(before: endpoint_pb2.Endpoint, after: endpoint_pb2.Endpoint) -> str:
    """`environ.MODE a -> b, resource_slots.cpu 1 -> 2`; empty if nothing was asked for differently."""
    old, new = dict(_flat(_canonical(before))), dict(_flat(_canonical(after)))
    told = []
    # Stable, so that the keys of a map come in their own order, and all else as the fields stand.
    keys = sorted(sorted({*old, *new}, key=[*old, *new].index), key=_position)
    for key in keys:
        if key not in new:
            told.append(f"{key} {_shown(old[key])} removed")
        elif key not in old:
            told.append(f"{key} {_shown(new[key])} added")
        elif old[key] != new[key]:
            told.append(f"{key} {_shown(old[key])} -> {_shown(new[key])}")
    return ", ".join(told)


def canonical(endpoint: endpoint_pb2.Endpoint) -> endpoint_pb2.Endpoint:
    """What was asked for, with the defaults that do not depend on anything else filled in."""
    result = endpoint_pb2.Endpoint()
    for field in _FIELDS:
        if _is_set(endpoint, field):
            _copy(result, endpoint, field.name)
    result.model = endpoint.model.rsplit("/", 1)[-1]
    result.runtime = endpoint.runtime.removeprefix("runtimes/") or "custom"
    result.preset = endpoint.preset.removeprefix("presets/")
    result.image = endpoint.image.removeprefix("images/")
    result.model_mount_destination = endpoint.model_mount_destination or asked.MOUNT_DESTINATION
    result.resource_group = endpoint.resource_group.removeprefix("resourceGroups/") or "default"
    result.cluster_mode = endpoint.cluster_mode or endpoint_pb2.CLUSTER_MODE_SINGLE_NODE
    result.cluster_size = endpoint.cluster_size or 1
    result.priority = endpoint.priority or asked.PRIORITY_DEFAULT
    result.metrics_path = endpoint.metrics_path or asked.METRICS_PATH
    result.image_pull_policy = endpoint.image_pull_policy or endpoint_pb2.IMAGE_PULL_POLICY_IF_NOT_PRESENT
    result.security_profile = endpoint.security_profile or endpoint_pb2.SECURITY_PROFILE_DEFAULT
    result.require_enforcement = asked.require_enforcement(endpoint, [])
    if not endpoint.scale_to_zero_after.ToNanoseconds():
        result.ClearField("scale_to_zero_after")
    for mount in result.extra_mounts:
        mount.folder = mount.folder.rsplit("/", 1)[-1]
        mount.target = mount.target or f"{asked.HOME}/{mount.folder}"
    result.rollout_policy.CopyFrom(asked.rollout_policy(endpoint.rollout_policy, []))
    if result.service == endpoint_pb2.ServiceOverride():
        result.ClearField("service")
    normalise_durations(result)
    return result


def normalise_durations(message: Message) -> None:
    """`1 s less 1 ns` can be sent, but has no JSON. What is out of all bounds is refused elsewhere."""
    for field, content in message.ListFields():
        if isinstance(content, duration_pb2.Duration):
            nanoseconds = content.ToNanoseconds()
            if abs(nanoseconds) < _NANOSECONDS_MAX:
                content.FromNanoseconds(nanoseconds)
        elif field.message_type is not None and not _is_map(field):
            for inner in content if field.is_repeated else (content,):
                normalise_durations(inner)


def _canonical(endpoint: endpoint_pb2.Endpoint) -> Mapping[str, Any]:
    message = canonical(endpoint)
    value = json_format.MessageToDict(message, preserving_proto_field_name=True)
    # Zero and false are values here, not absences.
    value |= {"replica_count": message.replica_count, "open_to_public": message.open_to_public}
    return {name: value[name] for name in ASKED if name in value}


def _position(key: str) -> tuple[int, str]:
    field = re.split(r"[.\[]", key, maxsplit=1)[0]
    return ASKED.index(field), key if field in _MAPS else ""


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{index}]")
    else:
        yield path, value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = " ".join(value) if isinstance(value, list) else str(value)
    for prefix in ("CLUSTER_MODE_", "ROLLOUT_STRATEGY_", "IMAGE_PULL_POLICY_", "SECURITY_PROFILE_"):
        text = text.removeprefix(prefix)
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    text = text if len(text) <= CHARACTERS_MAX else f"{text[:CHARACTERS_MAX]}..."
    return text or '""'


def _copy(target: Message, source: Message, path: str) -> bool:
    """Copies the value at `path`; False if it leads nowhere. What the source does not have is cleared."""
    name, _, rest = path.partition(".")
    field = target.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        return False
    if rest:
        return _copy_inside(target, source, field, rest)
    target.ClearField(name)
    if _is_map(field):
        getattr(target, name).update(getattr(source, name))
    elif field.is_repeated:
        getattr(target, name).MergeFrom(getattr(source, name))
    elif field.message_type is not None:
        if source.HasField(name):
            getattr(target, name).CopyFrom(getattr(source, name))
    elif _is_set(source, field):
        setattr(target, name, getattr(source, name))
    return True


def _copy_inside(target: Message, source: Message, field: Any, rest: str) -> bool:
    old, new = getattr(target, field.name), getattr(source, field.name)
    if _is_map(field):
        if rest in new:
            old[rest] = new[rest]
        elif rest in old:
            del old[rest]
        return True
    if field.message_type is None or field.is_repeated:
        return False
    return _copy(old, new, rest)


def _is_map(field: Any) -> bool:
    return bool(field.message_type is not None and field.message_type.GetOptions().map_entry)


def _is_set(message: Message, field: Any) -> bool:
    if field.is_repeated:
        return len(getattr(message, field.name)) > 0
    if field.has_presence:
        return bool(message.HasField(field.name))
    return bool(getattr(message, field.name))
