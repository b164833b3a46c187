"""What the options of create, update and validate come to: fields of the library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import click

from dure.client.manifest import STRATEGIES
from dure.client.notation import mount_source, mount_target, parse_mount, parse_steps, set_duration
from dure.client.wanted import EndpointFields
from dure.v1.endpoint_pb2 import Endpoint, ExtraMount, HealthCheckOverride, RolloutPolicy, ServiceOverride

ENV_FILE_BYTES_MAX = 1 << 20
# Option's parameter -> field, where the value goes as it is.
_PLAIN = {
    "runtime": "runtime",
    "replicas": "replicas",
    "public": "open_to_public",
    "group": "resource_group",
    "preset": "preset",
    "shm": "shared_memory",
    "image": "image",
    "architecture": "architecture",
    "pull_policy": "image_pull_policy",
    "require_enforcement": "require_enforcement",
    "profile": "security_profile",
    "mount_destination": "model_mount_destination",
    "definition": "model_definition_path",
    "cluster_mode": "cluster_mode",
    "cluster_size": "cluster_size",
    "priority": "priority",
    "scale_to_zero_after": "scale_to_zero_after",
    "metrics_path": "metrics_path",
}
_HEALTH = {
    "health_path": "path",
    "health_interval": "interval",
    "health_timeout": "max_wait_time",
    "health_retries": "max_retries",
    "health_status": "expected_status_code",
    "health_delay": "initial_delay",
    "health_early": "probe_during_initial_delay",
}
_ROLLOUT = ("max_surge", "max_unavailable", "progress_deadline", "canary", "manual_switch", "auto_rollback")
_RESETS: dict[str, dict[str, Any]] = {
    "environ": {"environ": {}},
    "resources": {"resource_slots": {}},
    "mounts": {"extra_mounts": []},
    "preset": {"preset": ""},
    "shm": {"shared_memory": ""},
    "image": {"image": ""},
    "architecture": {"architecture": ""},
    "pull-policy": {"image_pull_policy": "if-not-present"},
    "require-enforcement": {"require_enforcement": ""},
    "profile": {"security_profile": "default"},
    "group": {"resource_group": ""},
    "definition": {"model_definition_path": ""},
    "mount-destination": {"model_mount_destination": ""},
    "cluster": {"cluster_mode": "single-node", "cluster_size": 1},
    "priority": {"priority": 10},
    "scale-to-zero": {"scale_to_zero_after": 0.0},
    "metrics-path": {"metrics_path": ""},
}
_SERVICE_RESETS = {"command": "start_command", "port": "port", "health-check": "health_check"}
RESETS = (*_RESETS, *_SERVICE_RESETS, "rollout")


def fields_of(given: dict[str, Any], current: Endpoint | None = None) -> EndpointFields:
    """Only what was given. Mappings, mounts and messages are put over those of `current`.

    Raises UsageError.
    """
    fields: dict[str, Any] = {}
    for name in given.get("reset", ()):
        fields.update(_RESETS.get(name, {}))
    if given["private"]:
        given = {**given, "public": False}
    for option, field in _PLAIN.items():
        if given[option] is not None:
            fields[field] = given[option]
    base = current or Endpoint()
    from_files = [pair for path in given["env_files"] for pair in read_env_file(path)]
    edits = [*from_files, *_edits("-e", given["environ"], removing=current is not None)]
    if edits:
        fields["environ"] = _edited(fields.get("environ", base.environ), edits)
    slots = _edits("-r", given["resources"], removing=current is not None)
    if slots:
        fields["resource_slots"] = _edited(fields.get("resource_slots", base.resource_slots), slots)
    if given["mounts"]:
        mounts = fields.get("extra_mounts", list(base.extra_mounts))
        fields["extra_mounts"] = _mounts(given["mounts"], mounts, removing=current is not None)
    service = _service(given, base.service)
    if service is not None:
        fields["service"] = service
    policy = _rollout(given, base.rollout_policy)
    if policy is not None:
        fields["rollout_policy"] = policy
    return cast(EndpointFields, fields)


def anything(given: dict[str, Any]) -> bool:
    """Whether any of the options was given."""
    flags = ("private", "no_health_check")
    return any(value if name in flags else value not in (None, ()) for name, value in given.items())


def read_env_file(path: Path) -> list[tuple[str, str]]:
    """The pairs of a file: a KEY=VALUE on each line, `#` comments, quotes around a value are taken off.

    Raises UsageError with every line that is wrong.
    """
    if path.stat().st_size > ENV_FILE_BYTES_MAX:
        raise click.UsageError(f"{path} is larger than {ENV_FILE_BYTES_MAX // 1024} KiB")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is not UTF-8 text") from error
    found, wrong = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"\S+", key.strip()):
            wrong.append(f"{path}:{number}: `{line[:60]}` does not have the form KEY=VALUE")
            continue
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found.append((key.strip(), value))
    if wrong:
        raise click.UsageError("\n  ".join(wrong))
    return found


def _edits(option: str, texts: Iterable[str], *, removing: bool) -> list[tuple[str, str | None]]:
    """Key and value of each; None for `KEY-`, which takes one away."""
    edits: list[tuple[str, str | None]] = []
    for text in texts:
        key, equals, value = text.partition("=")
        if key and equals:
            edits.append((key, value))
        elif removing and text.endswith("-") and len(text) > 1:
            edits.append((text[:-1], None))
        else:
            also = ", or KEY- to remove it" if removing else ""
            raise click.BadParameter(
                f"`{text}` does not have the form KEY=VALUE{also}", param_hint=f"'{option}'"
            )
    keys = [key for key, _ in edits]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise click.UsageError(f"{option} {twice[0]}=... was given twice")
    return edits


def _edited(current: Any, edits: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    merged = dict(current)
    for key, value in edits:
        if value is not None:
            merged[key] = value
        elif merged.pop(key, None) is None:
            known = ", ".join(sorted(merged)) or "none"
            raise click.UsageError(f"`{key}` is not set, so it cannot be removed; set are: {known}")
    return merged


def _mounts(texts: Iterable[str], current: list[ExtraMount], *, removing: bool) -> list[ExtraMount]:
    kept, added = list(current), []
    for text in texts:
        if removing and text.endswith("-"):
            left = [m for m in kept if text[:-1] not in (mount_source(m), mount_target(m))]
            if len(left) == len(kept):
                known = ", ".join(mount_source(mount) for mount in kept) or "none"
                raise click.UsageError(f"`{text[:-1]}` is not mounted; mounted are: {known}")
            kept = left
            continue
        try:
            added.append(parse_mount(text))
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="'--mount'") from error
    replaced = {mount_target(mount) for mount in added}
    return [*(mount for mount in kept if mount_target(mount) not in replaced), *added]


def _service(given: dict[str, Any], current: ServiceOverride) -> ServiceOverride | None:
    reset = given.get("reset", ())
    service = ServiceOverride()
    service.CopyFrom(current)
    for name, field in _SERVICE_RESETS.items():
        if name in reset:
            service.ClearField(field)  # type: ignore[arg-type]
    if given["line"] is not None and given["args"]:
        raise click.UsageError("give --command or a list after `--`, not both")
    if given["shell_path"] is not None and given["line"] is None:
        raise click.UsageError("--shell belongs to --command")
    if given["line"] is not None:
        if not given["line"].strip():
            raise click.UsageError("--command is empty; `update --reset command` goes back to the default")
        service.start_command.Clear()
        service.start_command.line = given["line"]
        service.start_command.shell = given["shell_path"] or ""
    if given["args"]:
        service.start_command.Clear()
        service.start_command.args.extend(given["args"])
    if given["port"] is not None:
        service.port = given["port"]
    wanted = {field: given[option] for option, field in _HEALTH.items() if given[option] is not None}
    if given["no_health_check"]:
        if wanted:
            raise click.UsageError("--no-health-check leaves no room for other --health options")
        service.health_check.CopyFrom(HealthCheckOverride(disabled=True))
    elif wanted:
        service.health_check.disabled = False
    for field, value in wanted.items():
        if field in ("interval", "max_wait_time", "initial_delay"):
            set_duration(getattr(service.health_check, field), value)
        else:
            setattr(service.health_check, field, value)
    return service if service != current else None


def _rollout(given: dict[str, Any], current: RolloutPolicy) -> RolloutPolicy | None:
    policy = RolloutPolicy()
    if "rollout" not in given.get("reset", ()):
        policy.CopyFrom(current)
    if given["strategy"] is not None:
        policy.strategy = STRATEGIES[given["strategy"]]
        if given["strategy"] != "canary":
            policy.ClearField("steps")
    for option in ("max_surge", "max_unavailable"):
        if given[option] is not None:
            if not re.fullmatch(r"\d{1,5}%?", given[option]):
                hint = f"'--{option.replace('_', '-')}'"
                raise click.BadParameter(
                    f"`{given[option]}` is neither a number such as 1 nor a percentage such as 25%",
                    param_hint=hint,
                )
            setattr(policy, option, given[option])
    if given["progress_deadline"] is not None:
        set_duration(policy.progress_deadline, given["progress_deadline"])
    if given["canary"] is not None:
        if given["strategy"] not in (None, "canary"):
            raise click.UsageError(f"--canary belongs to --strategy canary, not to {given['strategy']}")
        try:
            steps = parse_steps(given["canary"])
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="'--canary'") from error
        policy.strategy = STRATEGIES["canary"]
        policy.ClearField("steps")
        policy.steps.extend(steps)
    if given["manual_switch"] is not None:
        policy.manual_switch = given["manual_switch"]
    if given["auto_rollback"] is not None:
        policy.no_automatic_rollback = not given["auto_rollback"]
    return policy if policy != current else None
