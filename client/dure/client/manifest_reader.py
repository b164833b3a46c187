"""Reads the files of `dure apply`: YAML or JSON, several documents allowed. Pure: texts in, requests out.

Every error of a text is told at once, with its line, its key and the nearest key that was probably meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from dure.client.manifest import STRATEGIES
from dure.client.notation import set_duration
from dure.client.rule_reader import RULE_KEYS, read_rules
from dure.client.wanted import CLUSTER_MODES, PROFILES, PULL_POLICIES, EndpointFields
from dure.definitions.environ import wrong_variable
from dure.definitions.problems import Problem, invalid
from dure.definitions.reader import Reader, is_null, join, kind, tag
from dure.v1.endpoint_pb2 import ExtraMount, RolloutPolicy, ServiceOverride
from dure.v1.scaling_pb2 import ScalingRule
from dure.wire import enforcement, names
from dure.wire.quantities import MEM, parse_duration_s, parse_slot

FILE_BYTES_MAX = 1 << 20
DOCUMENTS_MAX = 100
# The names of the API are understood as well.
_ALIASES = {"replica_count": "replicas", "rollout_policy": "rollout"}
KEYS = (
    "name", "project", "model", "runtime", "replicas", "open_to_public", "resource_group", "preset",
    "resource_slots", "shared_memory", "environ", "image", "architecture", "image_pull_policy",
    "security_profile", "require_enforcement", "model_mount_destination", "model_definition_path",
    "extra_mounts", "cluster_mode", "cluster_size", "priority", "service", "rollout", "scale_to_zero_after",
    "metrics_path", "scaling",
)  # fmt: skip
_MOUNT_KEYS = ("folder", "target", "subpath", "writable")
_SERVICE_KEYS = ("start_command", "shell", "port", "health_check")
_CHECK_KEYS = (
    "path", "interval", "max_retries", "max_wait_time", "expected_status_code", "initial_delay",
    "probe_during_initial_delay", "disabled",
)  # fmt: skip
_ROLLOUT_KEYS = (
    "strategy", "max_surge", "max_unavailable", "progress_deadline", "steps", "manual_switch",
    "no_automatic_rollback",
)  # fmt: skip
_HOMES = {
    **dict.fromkeys(("start_command", "port", "health_check"), "service"),
    **dict.fromkeys(_ROLLOUT_KEYS, "rollout"),
    **{key: "service.health_check" for key in _CHECK_KEYS if key not in ("path", "disabled")},
    **dict.fromkeys(("folder", "writable"), "extra_mounts[]"),
    **{key: "scaling[]" for key in RULE_KEYS if key not in ("name", "type", "step", "max", "min", "enabled")},
}


@dataclass(frozen=True)
class Manifest:
    """One document. `fields` has every field that a file can say, those that it left out at their default;
    `replicas` None: left out, so that an endpoint keeps its number; `rules` None likewise."""

    name: str
    model: str
    project: str | None
    replicas: int | None
    fields: EndpointFields = field(default_factory=EndpointFields)
    rules: tuple[ScalingRule, ...] | None = None


def read_manifests(text: str, file: str) -> list[Manifest]:
    """Raises InvalidInput with every problem of the text."""
    problems: list[Problem] = []
    manifests: list[Manifest] = []
    lines: dict[tuple[str | None, str], int] = {}
    for line, document in _documents(text):
        if len(manifests) >= DOCUMENTS_MAX:
            problems.append(Problem(file, line, "", f"more than {DOCUMENTS_MAX} documents in a file"))
            break
        reader = Reader(file, _HOMES)
        root = reader.load(document, "a mapping with the keys `name` and `model`")
        if root is not None:
            found: list[Manifest] = []
            reader.walk(lambda root=root, reader=reader, found=found: found.append(_manifest(reader, root)))  # type: ignore[misc]
            for manifest in found:
                key = (manifest.project, manifest.name)
                if manifest.name and key in lines:
                    reader.wrong(root, "name", f"`{manifest.name}` is in line {lines[key]} already")
                lines[key] = root.start_mark.line + 1
            manifests += found
        problems += reader.problems
    if problems:
        raise invalid(problems)
    return manifests


def _documents(text: str) -> Iterator[tuple[int, str]]:
    """First line and text of every document, with empty lines in front so that errors know theirs."""
    if text.lstrip().startswith(("{", "[")):
        text = text.replace("\t", " ")  # JSON may be indented by tabs, and has none inside of texts
    parts: list[tuple[int, list[str]]] = [(1, [])]
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"---(\s|$)", line):
            parts.append((number, []))
            line = f"   {line[3:]}"
        if re.match(r"\.\.\.(\s|$)", line):
            parts.append((number, []))
            continue
        parts[-1][1].append(line)
    kept = [(number, lines) for number, lines in parts if any(_says(line) for line in lines)]
    for number, lines in kept or parts[:1]:
        yield number, "\n" * (number - 1) + "\n".join(lines) + "\n"


def _says(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _manifest(reader: Reader, root: yaml.Node) -> Manifest:
    found = reader.mapping(root, "", (*KEYS, *_ALIASES)) or {}
    for alias, key in _ALIASES.items():
        if alias in found and key in found:
            reader.wrong(found[alias], alias, f"says the same as `{key}`: leave one of them out")
        elif alias in found:
            found[key] = found[alias]
    if isinstance(root, yaml.MappingNode):
        for key in ("name", "model"):
            if key not in found:
                reader.wrong(root, key, "is required")
    name = reader.text(found.get("name"), "name")
    problem = names.check_id(name, names.ENDPOINT_ID, "name") if name else None
    if problem is not None:
        reader.wrong(found["name"], "name", problem.description)
    text = {
        key: reader.text(found.get(key), key)
        for key in (
            "runtime", "resource_group", "preset", "image", "architecture", "model_mount_destination",
            "model_definition_path",
        )
    }  # fmt: skip
    fields = EndpointFields(
        runtime=text["runtime"] or "custom",
        open_to_public=reader.boolean(found.get("open_to_public"), "open_to_public", False),
        resource_group=text["resource_group"],
        preset=text["preset"],
        image=text["image"],
        architecture=text["architecture"],
        model_mount_destination=text["model_mount_destination"],
        model_definition_path=text["model_definition_path"],
        resource_slots=_slots(reader, found.get("resource_slots")),
        shared_memory=_memory(reader, found.get("shared_memory"), "shared_memory"),
        environ=_environ(reader, found.get("environ")),
        extra_mounts=_mounts(reader, found.get("extra_mounts")),
        cluster_size=reader.integer(found.get("cluster_size"), "cluster_size", 1, 1, 64),
        priority=reader.integer(found.get("priority"), "priority", 10, 1, 100),
        service=_service(reader, found.get("service")),
        rollout_policy=_rollout(reader, found.get("rollout")),
        scale_to_zero_after=_idle_s(reader, found.get("scale_to_zero_after"), "scale_to_zero_after"),
        metrics_path=_path(reader, found.get("metrics_path"), "metrics_path"),
    )
    mode = _choice(reader, found.get("cluster_mode"), "cluster_mode", tuple(CLUSTER_MODES))
    fields["cluster_mode"] = "multi-node" if mode == "multi-node" else "single-node"
    policy = _choice(reader, found.get("image_pull_policy"), "image_pull_policy", tuple(PULL_POLICIES))
    fields["image_pull_policy"] = policy or "if-not-present"  # type: ignore[typeddict-item]
    profile = _choice(reader, found.get("security_profile"), "security_profile", tuple(PROFILES))
    fields["security_profile"] = "strict" if profile == "strict" else "default"
    fields["require_enforcement"] = _choice(
        reader, found.get("require_enforcement"), "require_enforcement", enforcement.MODES
    )
    replicas = found.get("replicas")
    return Manifest(
        name=name,
        model=reader.text(found.get("model"), "model"),
        project=reader.text(found.get("project"), "project") or None,
        replicas=None if replicas is None else reader.integer(replicas, "replicas", 1, 0, 10_000),
        fields=fields,
        rules=tuple(read_rules(reader, found["scaling"], "scaling")) if "scaling" in found else None,
    )


def _slots(reader: Reader, node: yaml.Node | None) -> dict[str, str]:
    slots: dict[str, str] = {}
    if node is None:
        return slots
    for slot, (key, value) in (reader.entries(node, "resource_slots", "slots and amounts") or {}).items():
        path = join("resource_slots", slot)
        slots[slot] = reader.word(value, path)
        if is_null(value) or not isinstance(value, yaml.ScalarNode):
            continue
        try:
            parse_slot(slot, slots[slot])
        except ValueError as error:
            reader.wrong(key, path, str(error))
    return slots


def _memory(reader: Reader, node: yaml.Node | None, path: str) -> str:
    if node is None:
        return ""
    size = reader.word(node, path)
    try:
        parse_slot(MEM, size)
    except ValueError as error:
        reader.wrong(node, path, str(error))
    return size


def _environ(reader: Reader, node: yaml.Node | None) -> dict[str, str]:
    environ: dict[str, str] = {}
    if node is None:
        return environ
    for key, (key_node, value) in (reader.entries(node, "environ", "names and values") or {}).items():
        path = join("environ", key)
        wrong = wrong_variable(key, "")
        if wrong:
            reader.wrong(key_node, path, wrong)
        elif is_null(value):
            reader.wrong(value, path, 'has no value; write "" for an empty one')
        else:
            environ[key] = reader.scalar(value, path)
    return environ


def _mounts(reader: Reader, node: yaml.Node | None) -> list[ExtraMount]:
    mounts = []
    for index, item in enumerate((node and reader.sequence(node, "extra_mounts", "mounts")) or ()):
        path = f"extra_mounts[{index}]"
        found = reader.mapping(item, path, _MOUNT_KEYS, required=("folder",)) or {}
        target = reader.text(found.get("target"), join(path, "target"))
        if target and not target.startswith("/"):
            reader.wrong(found["target"], join(path, "target"), f"`{target}` does not begin with `/`")
        mounts.append(
            ExtraMount(
                folder=reader.text(found.get("folder"), join(path, "folder")),
                target=target,
                subpath=reader.text(found.get("subpath"), join(path, "subpath")),
                writable=reader.boolean(found.get("writable"), join(path, "writable"), False),
            )
        )
    return mounts


def _service(reader: Reader, node: yaml.Node | None) -> ServiceOverride:
    service = ServiceOverride()
    found = (node and reader.mapping(node, "service", _SERVICE_KEYS)) or {}
    command = found.get("start_command")
    if isinstance(command, yaml.SequenceNode):
        service.start_command.args.extend(reader.words(command, "service.start_command") or [])
        if not command.value:
            reader.wrong(command, "service.start_command", "is an empty list; leave it out for the default")
        if "shell" in found:
            reader.wrong(found["shell"], "service.shell", "a command that is a list runs without a shell")
    elif command is not None:
        service.start_command.line = reader.text(command, "service.start_command")
        service.start_command.shell = reader.text(found.get("shell"), "service.shell")
    elif "shell" in found:
        reader.wrong(found["shell"], "service.shell", "is of no use without a `start_command`")
    service.port = reader.integer(found.get("port"), "service.port", 0, 1, 65535)
    check = found.get("health_check")
    if check is not None and tag(check) == "bool":
        if reader.boolean(check, "service.health_check", True):
            reader.wrong(check, "service.health_check", "found `true`, expected a mapping or `false`")
        service.health_check.disabled = True
    elif check is not None:
        _health_check(reader, check, service)
    return service


def _health_check(reader: Reader, node: yaml.Node, service: ServiceOverride) -> None:
    path = "service.health_check"
    found = reader.mapping(node, path, _CHECK_KEYS) or {}
    check = service.health_check
    check.SetInParent()
    if "path" in found:
        check.path = reader.text(found["path"], f"{path}.path")
        if check.path and not check.path.startswith("/"):
            reader.wrong(found["path"], f"{path}.path", f"`{check.path}` does not begin with `/`")
    for key, zero in (("interval", False), ("max_wait_time", False), ("initial_delay", True)):
        if key in found:
            set_duration(getattr(check, key), _seconds(reader, found[key], f"{path}.{key}", zero=zero))
    if "max_retries" in found:
        check.max_retries = reader.integer(found["max_retries"], f"{path}.max_retries", 1, 1, 10_000)
    if "expected_status_code" in found:
        where = f"{path}.expected_status_code"
        check.expected_status_code = reader.integer(found["expected_status_code"], where, 200, 100, 599)
    if "probe_during_initial_delay" in found:
        where = f"{path}.probe_during_initial_delay"
        check.probe_during_initial_delay = reader.boolean(found["probe_during_initial_delay"], where, False)
    check.disabled = reader.boolean(found.get("disabled"), f"{path}.disabled", False)


def _rollout(reader: Reader, node: yaml.Node | None) -> RolloutPolicy:
    policy = RolloutPolicy()
    found = (node and reader.mapping(node, "rollout", _ROLLOUT_KEYS)) or {}
    strategy = _choice(reader, found.get("strategy"), "rollout.strategy", tuple(STRATEGIES))
    if strategy:
        policy.strategy = STRATEGIES[strategy]
    for key in ("max_surge", "max_unavailable"):
        if key in found:
            setattr(policy, key, reader.word(found[key], f"rollout.{key}"))
            if not re.fullmatch(r"\d{1,5}%?", getattr(policy, key)):
                wrong = f"found {kind(found[key])}, expected a number such as 1, or a percentage such as 25%"
                reader.wrong(found[key], f"rollout.{key}", wrong)
    if "progress_deadline" in found:
        seconds = _seconds(reader, found["progress_deadline"], "rollout.progress_deadline", zero=False)
        set_duration(policy.progress_deadline, seconds)
    steps = found.get("steps")
    for index, item in enumerate((steps and reader.sequence(steps, "rollout.steps", "steps")) or ()):
        path = f"rollout.steps[{index}]"
        values = reader.mapping(item, path, ("weight", "hold"), required=("weight",)) or {}
        step = policy.steps.add(weight=reader.integer(values.get("weight"), f"{path}.weight", 1, 1, 99))
        if "hold" in values:
            set_duration(step.hold, _seconds(reader, values["hold"], f"{path}.hold", zero=False))
    for key in ("manual_switch", "no_automatic_rollback"):
        setattr(policy, key, reader.boolean(found.get(key), f"rollout.{key}", False))
    return policy


def _seconds(reader: Reader, node: yaml.Node, path: str, *, zero: bool) -> float:
    """A duration: `60s`, `1m30s`, or a number of seconds."""
    before = len(reader.problems)
    text = reader.word(node, path)
    if len(reader.problems) > before:
        return 1.0
    try:
        seconds = parse_duration_s(text)
    except ValueError as error:
        reader.wrong(node, path, str(error))
        return 1.0
    if not (0 < seconds <= 1e8 or (zero and seconds == 0)):
        reader.wrong(node, path, f"found {kind(node)}, expected a duration of more than zero")
        return 1.0
    return seconds


def _idle_s(reader: Reader, node: yaml.Node | None, path: str) -> float:
    return 0.0 if node is None else _seconds(reader, node, path, zero=True)


def _path(reader: Reader, node: yaml.Node | None, path: str) -> str:
    """An HTTP path; empty if it is not there."""
    text = reader.text(node, path)
    if text and not text.startswith("/"):
        reader.wrong(node or 1, path, f"`{text}` does not begin with `/`")
    return text


def _choice(reader: Reader, node: yaml.Node | None, path: str, known: tuple[str, ...]) -> str:
    """One of `known`, however it is spelled (`MULTI_NODE`); empty if it is not there, or wrong."""
    if node is None:
        return ""
    before = len(reader.problems)
    word = reader.text(node, path).lower().replace("_", "-")
    if word in known or len(reader.problems) > before:
        return word if word in known else ""
    reader.wrong(node, path, f"found {kind(node)}, expected one of: {', '.join(known)}")
    return ""
