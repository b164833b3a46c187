"""The model definition file: what it may say, and everything that is wrong with it, at once.

`read` takes the text of a `model-definition.yaml` (the format of the specification) and returns a template
of the kernels that run it, and every problem: file and line, key path, what was found, what was expected
and, for an unknown key, the nearest known one. `parse` is the same for who wants an exception.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from dure.definitions.actions import read_actions
from dure.definitions.problems import Problem, invalid, shown
from dure.definitions.reader import Reader, join, kind
from dure.fleet.v1 import fleet_pb2

DEFAULT_NAMES = ("model-definition.yaml", "model-definition.yml")
DEFINITION_BYTES_MAX = 256 * 1024
RESERVED_PORTS = (2000, 2001, 2200, 7681)
DEFAULT_SHELL = "/bin/bash"
SECONDS_MAX = 86_400
METADATA_LISTS = ("framework", "label")

_METADATA = (
    "author", "title", "version", "created", "last_modified", "description", "task", "category",
    "architecture", "framework", "label", "license", "min_resource",
)  # fmt: skip
_MODEL = ("name", "model_path", "service", "metadata")
_SERVICE = ("pre_start_actions", "start_command", "shell", "port", "health_check")
_HEALTH = (
    "path", "interval", "max_retries", "max_wait_time", "expected_status_code", "initial_delay",
    "probe_during_initial_delay",
)  # fmt: skip
# Where a key belongs, to be told when it stands elsewhere; not for words that stand in several places.
_HOMES = (
    dict.fromkeys(("name", "model_path", "service", "metadata"), "models[]")
    | dict.fromkeys(_SERVICE, "models[].service")
    | {key: "models[].service.health_check" for key in _HEALTH if key != "path"}
    | {key: "models[].metadata" for key in _METADATA if key != "description"}
    | dict.fromkeys(("action", "args", "ref"), "models[].service.pre_start_actions[]")
)


@dataclass(frozen=True)
class Definition:
    """A definition file that is right: `kernel` has the fields that it decides, nothing else."""

    model_name: str
    kernel: fleet_pb2.KernelSpec
    metadata: Mapping[str, Any] = field(default_factory=dict)


def parse(text: str, file: str) -> Definition:
    """Raises InvalidInput with every violation of the file."""
    definition, problems = read(text, file)
    if definition is None:
        raise invalid(problems)
    return definition


def read(text: str, file: str) -> tuple[Definition | None, list[Problem]]:
    """The definition if nothing is wrong, else None and at least one problem."""
    reader = Reader(file, _HOMES)
    found: list[Definition | None] = []
    root = reader.load(text, "a mapping with the key `models`")
    if root is not None:
        reader.walk(lambda: found.append(_definition(reader, root)))
    definition = found[0] if found else None
    problems = sorted(reader.problems, key=lambda problem: problem.line)
    return (None if problems else definition), problems


def takes_literal_port(command: fleet_pb2.Command, port: int) -> bool:
    """Whether a command names the declared port itself: as a word of its own, or at the end of one, as in
    `--x=NUMBER`, `-pNUMBER` and `0.0.0.0:NUMBER`. Arguments count by their words, too: `sh -c` takes one.

    A command that uses `{port}` or `$PORT` anywhere can be given another one.
    """
    texts = command.argv.args if command.HasField("argv") else [command.shell.line]
    words = [word for text in texts for word in re.split(r"[\s;|&'\"(),]+", text)]
    if any("{port}" in word or re.search(r"\$(PORT\b|\{PORT\b)", word) for word in words):
        return False
    return any(re.fullmatch(rf"(?:.*[=:]|-\w)?{port}", word) for word in words)


def reserved_port(port: int) -> str:
    """Why a service cannot have a port, empty if it can."""
    if port not in RESERVED_PORTS:
        return ""
    return f"{port} is reserved ({', '.join(map(str, RESERVED_PORTS))} are); choose another"


def _definition(reader: Reader, root: yaml.Node) -> Definition | None:
    top = reader.mapping(root, "", ("models",), required=("models",))
    if top is None or "models" not in top:
        return None
    models = reader.sequence(top["models"], "models", "models")
    if models is None:
        return None
    if not models:
        reader.wrong(top["models"], "models", "is empty; expected at least one model")
    found: list[tuple[Definition, yaml.Node, str]] = []
    for index, node in enumerate(models):
        path = f"models[{index}]"
        entry = reader.mapping(node, path, _MODEL, required=("name", "model_path"))
        if entry is None:
            continue
        name = reader.text(entry.get("name"), f"{path}.name")
        model_path = _model_path(reader, entry.get("model_path"), f"{path}.model_path")
        metadata = _metadata(reader, entry.get("metadata"), f"{path}.metadata")
        if "service" not in entry:
            continue
        kernel = _service(reader, entry["service"], f"{path}.service")
        kernel.command.model_path = model_path
        kernel.model_name = name
        found.append((Definition(name, kernel, metadata), entry["service"], path))
    for _, node, path in found[1:]:
        twice = f"more than one model has a `service` (`{found[0][2]}` too); exactly one can be served"
        reader.wrong(node, f"{path}.service", twice)
    if not found:
        if models and not reader.problems:
            reader.wrong(
                top["models"], "models", "no model has a `service`; exactly one must say how it is served"
            )
        return None
    return found[0][0]


def _model_path(reader: Reader, node: yaml.Node | None, path: str) -> str:
    model_path = reader.text(node, path)
    if node is not None and model_path.strip() and not _is_absolute(model_path):
        found = f"`{shown(model_path)}` is not an absolute path without `..`; expected one such as `/models`"
        reader.wrong(node, path, found)
    return model_path


def _is_absolute(path: str) -> bool:
    return path.startswith("/") and ".." not in path.split("/") and path.isprintable()


def _metadata(reader: Reader, node: yaml.Node | None, path: str) -> Mapping[str, Any]:
    values = reader.mapping(node, path, _METADATA) if node is not None else None
    metadata: dict[str, Any] = {}
    for key, value in (values or {}).items():
        at = f"{path}.{key}"
        if key in METADATA_LISTS:
            metadata[key] = reader.words(value, at) or []
        elif key == "min_resource":
            slots = reader.entries(value, at, "a mapping of slots to amounts") or {}
            metadata[key] = {slot: reader.word(amount, join(at, slot)) for slot, (_, amount) in slots.items()}
        else:
            metadata[key] = reader.scalar(value, at)
    return metadata


def _service(reader: Reader, node: yaml.Node, path: str) -> fleet_pb2.KernelSpec:
    kernel = fleet_pb2.KernelSpec()
    values = reader.mapping(node, path, _SERVICE, required=("start_command", "port"))
    if values is None:
        return kernel
    shell = _shell(reader, values.get("shell"), f"{path}.shell")
    if "start_command" in values:
        _command(reader, values["start_command"], f"{path}.start_command", shell, kernel.command)
    if "port" in values:
        kernel.port = reader.integer(values["port"], f"{path}.port", 1, 1, 65535)
        if reserved := reserved_port(kernel.port):
            reader.wrong(values["port"], f"{path}.port", reserved)
    kernel.pre_start_actions.extend(
        read_actions(
            reader, values.get("pre_start_actions"), f"{path}.pre_start_actions", values.get("start_command")
        )
    )
    if "health_check" in values:
        _health_check(reader, values["health_check"], f"{path}.health_check", kernel.health_check)
    kernel.fixed_port = takes_literal_port(kernel.command, kernel.port)
    return kernel


def _shell(reader: Reader, node: yaml.Node | None, path: str) -> str:
    shell = reader.text(node, path, DEFAULT_SHELL)
    if node is not None and shell.strip() and not _is_absolute(shell):
        reader.wrong(
            node, path, f"found `{shown(shell)}`, expected the absolute path of a shell, such as `/bin/sh`"
        )
    return shell


def _command(reader: Reader, node: yaml.Node, path: str, shell: str, command: fleet_pb2.Command) -> None:
    if isinstance(node, yaml.ScalarNode):
        command.shell.CopyFrom(fleet_pb2.Shell(shell=shell, line=reader.text(node, path)))
        return
    if not isinstance(node, yaml.SequenceNode):
        reader.wrong(node, path, f"found {kind(node)}, expected text or a list of texts")
        return
    words = reader.words(node, path) or []
    if not words:
        reader.wrong(node, path, "must not be empty; the first item is the program")
    elif not words[0].strip():
        reader.wrong(node.value[0], f"{path}[0]", "must not be empty: it is the program")
    command.argv.args.extend(words)


def _health_check(reader: Reader, node: yaml.Node, path: str, check: fleet_pb2.HealthCheck) -> None:
    values = reader.mapping(node, path, _HEALTH, required=("path",))
    if values is None:
        return
    check.path = reader.text(values.get("path"), f"{path}.path", "/")
    if "path" in values and check.path.strip() and not is_http_path(check.path):
        found = f"found `{shown(check.path)}`; it must begin with `/` and have no spaces"
        reader.wrong(values["path"], f"{path}.path", found)

    def milliseconds(key: str, default_s: float, *, zero: bool = False) -> int:
        expected = f"seconds, {'0 or more' if zero else 'more than 0'}, at most {SECONDS_MAX}"
        least = 0 if zero else 0.001
        value_s = reader.number(
            values.get(key), f"{path}.{key}", default_s, lambda n: least <= n <= SECONDS_MAX, expected
        )
        return round(value_s * 1000)

    check.interval_ms = milliseconds("interval", 10.0)
    check.max_wait_time_ms = milliseconds("max_wait_time", 15.0)
    check.initial_delay_ms = milliseconds("initial_delay", 60.0, zero=True)
    check.max_retries = reader.integer(values.get("max_retries"), f"{path}.max_retries", 10, 1, 1_000_000)
    check.expected_status_code = reader.integer(
        values.get("expected_status_code"), f"{path}.expected_status_code", 200, 100, 599
    )
    check.probe_during_initial_delay = reader.boolean(
        values.get("probe_during_initial_delay"), f"{path}.probe_during_initial_delay", False
    )


def is_http_path(path: str) -> bool:
    return path.startswith("/") and re.search(r"[\s\x00-\x1f\x7f]", path) is None
