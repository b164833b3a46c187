"""The model definition file: what it may say, and everything that is wrong with it, at once.

`parse` reads the text of a `model-definition.yaml` (the format of the specification) and returns a
template of the kernels that run it, or raises InvalidInput with one violation per error: file and line,
key path, what was found, what was expected and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from dure.fleet.v1 import fleet_pb2
from dure.wire.errors import InvalidInput, Violation

DEFAULT_NAMES = ("model-definition.yaml", "model-definition.yml")
DEFINITION_BYTES_MAX = 256 * 1024
RESERVED_PORTS = (2000, 2001, 2200, 7681)
DEFAULT_SHELL = "/bin/bash"


@dataclass(frozen=True)
class Definition:
    """A definition file that is right: `kernel` has the fields that it decides, nothing else."""

    model_name: str
    kernel: fleet_pb2.KernelSpec
    metadata: Mapping[str, Any] = field(default_factory=dict)


def parse(text: str, file: str) -> Definition:
    """Raises InvalidInput with every violation of the file."""
    reader = _Reader(file)
    root = reader.load(text)
    definition = _definition(reader, root) if root is not None else None
    if reader.violations:
        raise InvalidInput.of(reader.violations)
    assert definition is not None
    return definition


def takes_literal_port(command: fleet_pb2.Command, port: int) -> bool:
    """Whether a command names the declared port itself, as a word of its own or as `--x=NUMBER`.

    A command that uses `{port}` or `$PORT` anywhere can be given another one.
    """
    words = (
        list(command.argv.args) if command.HasField("argv") else re.split(r"[\s;|&'\"]+", command.shell.line)
    )
    if any("{port}" in word or re.search(r"\$(PORT\b|\{PORT\b)", word) for word in words):
        return False
    return any(word == str(port) or re.fullmatch(rf"--?[\w.-]+={port}", word) for word in words)


class _Reader:
    """Walks YAML nodes, which know their lines, and collects violations."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.violations: list[Violation] = []

    def wrong(self, node: yaml.Node | int, path: str, description: str) -> None:
        line = node if isinstance(node, int) else node.start_mark.line + 1
        where = f"{self.file}:{line}" + (f": {path}" if path else "")
        if len(self.violations) < 100:
            self.violations.append(Violation(where, description))

    def load(self, text: str) -> yaml.Node | None:
        if not text.strip():
            self.wrong(1, "", "the file is empty; expected a mapping with the key `models`")
            return None
        try:
            # An alias bomb is small as nodes: composing shares them, and nothing here expands them.
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = error.problem or error.context or "cannot be read"
            self.wrong(mark.line + 1 if mark else 1, "", f"not YAML: {problem}")
            return None
        except (yaml.YAMLError, RecursionError) as error:
            self.wrong(1, "", f"not YAML: {str(error)[:200]}")
            return None
        if root is None:
            self.wrong(1, "", "the file has no content; expected a mapping with the key `models`")
        return root

    def mapping(
        self, node: yaml.Node, path: str, known: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> dict[str, yaml.Node] | None:
        """The values by key, None if the node is not a mapping."""
        if not isinstance(node, yaml.MappingNode):
            self.wrong(node, path, f"found {_kind(node)}, expected a mapping with {_keys(known)}")
            return None
        values: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in values:
                self.wrong(key_node, _join(path, key), "the key stands here twice")
            elif key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
                self.wrong(key_node, _join(path, key[:60]), f"unknown key{hint}")
            else:
                values[key] = value
        for key in required:
            if key not in values:
                self.wrong(node, _join(path, key), "is required")
        return values

    def sequence(self, node: yaml.Node, path: str, of: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self.wrong(node, path, f"found {_kind(node)}, expected a list of {of}")
            return []
        return list(node.value)

    def text(self, node: yaml.Node | None, path: str, default: str = "") -> str:
        """A non-empty string; a number or a boolean must be quoted."""
        if node is None:
            return default
        if not isinstance(node, yaml.ScalarNode) or _tag(node) != "str":
            self.wrong(node, path, f"found {_kind(node)}, expected text")
            return default
        if not node.value.strip():
            self.wrong(node, path, "must not be empty")
        if "\0" in node.value:
            self.wrong(node, path, "must not contain a NUL character")
        return str(node.value)

    def word(self, node: yaml.Node, path: str) -> str:
        """An argument: text, or a number written without quotes; may be empty."""
        if not isinstance(node, yaml.ScalarNode) or _tag(node) not in ("str", "int", "float"):
            self.wrong(node, path, f"found {_kind(node)}, expected text (quote it)")
            return "?"
        if "\0" in node.value:
            self.wrong(node, path, "must not contain a NUL character")
        return str(node.value)

    def body(self, node: yaml.Node | None, path: str) -> str:
        """Content of a file: text, or a list of lines."""
        if node is None:
            return ""
        if isinstance(node, yaml.SequenceNode):
            lines = [self.word(line, f"{path}[{index}]") for index, line in enumerate(node.value)]
            return "".join(f"{line}\n" for line in lines)
        if isinstance(node, yaml.ScalarNode) and _tag(node) != "null":
            return str(node.value)
        self.wrong(node, path, f"found {_kind(node)}, expected text or a list of lines")
        return ""

    def boolean(self, node: yaml.Node | None, path: str, default: bool) -> bool:
        if node is None:
            return default
        if isinstance(node, yaml.ScalarNode) and node.value.lower() in ("true", "false"):
            return bool(node.value.lower() == "true")
        self.wrong(node, path, f"found {_kind(node)}, expected true or false")
        return default

    def number(
        self,
        node: yaml.Node | None,
        path: str,
        default: float,
        accept: Callable[[float], bool],
        expected: str,
    ) -> float:
        if node is None:
            return default
        value: Any = None
        if isinstance(node, yaml.ScalarNode) and _tag(node) in ("int", "float"):
            try:
                value = yaml.safe_load(node.value)
            except (yaml.YAMLError, ValueError):
                value = None
        if not isinstance(value, (int, float)) or value != value or not accept(value):
            self.wrong(node, path, f"found {_kind(node)}, expected {expected}")
            return default
        return value

    def integer(self, node: yaml.Node | None, path: str, default: int, low: int, high: int) -> int:
        expected = f"a whole number from {low} to {high}"
        value = self.number(node, path, default, lambda n: low <= n <= high and isinstance(n, int), expected)
        return int(value)

    def mode(self, node: yaml.Node | None, path: str, default: int = 0o644) -> int:
        """Permission bits: octal digits, quoted or not."""
        if node is None:
            return default
        value = node.value if isinstance(node, yaml.ScalarNode) else ""
        match = re.fullmatch(r"0?o?([0-7]{3,4})", value)
        if match is None:
            self.wrong(node, path, f'found {_kind(node)}, expected permission bits such as "644"')
            return default
        return int(match[1], 8)


_METADATA = (
    "author", "title", "version", "created", "last_modified", "description", "task", "category",
    "architecture", "framework", "label", "license", "min_resource",
)  # fmt: skip
_SERVICE = ("pre_start_actions", "start_command", "shell", "port", "health_check")
_HEALTH = (
    "path", "interval", "max_retries", "max_wait_time", "expected_status_code", "initial_delay",
    "probe_during_initial_delay",
)  # fmt: skip


def _definition(reader: _Reader, root: yaml.Node) -> Definition | None:
    top = reader.mapping(root, "", ("models",), required=("models",))
    if top is None or "models" not in top:
        return None
    models = reader.sequence(top["models"], "models", "models")
    if not models and isinstance(top["models"], yaml.SequenceNode):
        reader.wrong(top["models"], "models", "is empty; expected at least one model")
    found: list[tuple[Definition, yaml.Node]] = []
    for index, node in enumerate(models):
        path = f"models[{index}]"
        known = ("name", "model_path", "service", "metadata")
        entry = reader.mapping(node, path, known, required=("name", "model_path"))
        if entry is None:
            continue
        name = reader.text(entry.get("name"), f"{path}.name")
        model_path = reader.text(entry.get("model_path"), f"{path}.model_path")
        if model_path and (not model_path.startswith("/") or ".." in model_path.split("/")):
            expected = f"`{model_path[:80]}` is not an absolute path without `..`"
            reader.wrong(entry["model_path"], f"{path}.model_path", expected)
        metadata = _metadata(reader, entry.get("metadata"), f"{path}.metadata")
        if "service" not in entry:
            continue
        kernel = _service(reader, entry["service"], f"{path}.service")
        kernel.command.model_path = model_path
        kernel.model_name = name
        found.append((Definition(name, kernel, metadata), entry["service"]))
    if len(found) > 1:
        reader.wrong(found[1][1], "models", "more than one model has a `service`; exactly one can be served")
    if not found:
        if models:
            reader.wrong(
                top["models"], "models", "no model has a `service`; exactly one must say how it is served"
            )
        return None
    return found[0][0]


def _metadata(reader: _Reader, node: yaml.Node | None, path: str) -> Mapping[str, Any]:
    if node is None:
        return {}
    values = reader.mapping(node, path, _METADATA)
    if values is None:
        return {}
    metadata: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("framework", "label"):
            items = reader.sequence(value, f"{path}.{key}", "texts")
            metadata[key] = [reader.word(item, f"{path}.{key}[{i}]") for i, item in enumerate(items)]
        elif key == "min_resource":
            if not isinstance(value, yaml.MappingNode):
                reader.wrong(value, f"{path}.{key}", f"found {_kind(value)}, expected a mapping of slots")
            else:
                metadata[key] = {
                    str(k.value): reader.word(v, f"{path}.{key}.{k.value}") for k, v in value.value
                }
        elif isinstance(value, yaml.ScalarNode):
            metadata[key] = str(value.value)
        else:
            reader.wrong(value, f"{path}.{key}", f"found {_kind(value)}, expected text")
    return metadata


def _service(reader: _Reader, node: yaml.Node, path: str) -> fleet_pb2.KernelSpec:
    kernel = fleet_pb2.KernelSpec()
    values = reader.mapping(node, path, _SERVICE, required=("start_command", "port"))
    if values is None:
        return kernel
    shell = reader.text(values.get("shell"), f"{path}.shell", DEFAULT_SHELL)
    if "start_command" in values:
        _command(reader, values["start_command"], f"{path}.start_command", shell, kernel.command)
    if "port" in values:
        kernel.port = reader.integer(values["port"], f"{path}.port", 1, 1, 65535)
        if kernel.port in RESERVED_PORTS:
            taken = ", ".join(map(str, RESERVED_PORTS))
            reader.wrong(values["port"], f"{path}.port", f"{kernel.port} is reserved ({taken} are)")
    if "pre_start_actions" in values:
        actions = reader.sequence(values["pre_start_actions"], f"{path}.pre_start_actions", "actions")
        for index, action in enumerate(actions):
            _action(reader, action, f"{path}.pre_start_actions[{index}]", kernel.pre_start_actions.add())
    if "health_check" in values:
        _health_check(reader, values["health_check"], f"{path}.health_check", kernel.health_check)
    kernel.fixed_port = takes_literal_port(kernel.command, kernel.port)
    return kernel


def _command(reader: _Reader, node: yaml.Node, path: str, shell: str, command: fleet_pb2.Command) -> None:
    if isinstance(node, yaml.ScalarNode):
        command.shell.CopyFrom(fleet_pb2.Shell(shell=shell, line=reader.text(node, path)))
        return
    if not isinstance(node, yaml.SequenceNode):
        reader.wrong(node, path, f"found {_kind(node)}, expected text or a list of texts")
        return
    words = [reader.word(word, f"{path}[{index}]") for index, word in enumerate(node.value)]
    if not words or not words[0].strip():
        reader.wrong(node, path, "must not be empty; the first item is the program")
    command.argv.args.extend(words)


def _health_check(reader: _Reader, node: yaml.Node, path: str, check: fleet_pb2.HealthCheck) -> None:
    values = reader.mapping(node, path, _HEALTH, required=("path",)) or {}
    check.path = reader.text(values.get("path"), f"{path}.path", "/")
    if not check.path.startswith("/") or re.search(r"[\s\x00-\x1f]", check.path):
        reader.wrong(
            values["path"], f"{path}.path", f"`{check.path[:80]}` must begin with `/` and have no spaces"
        )

    def milliseconds(key: str, default_s: float, *, zero: bool = False) -> int:
        expected = f"seconds, {'0 or more' if zero else 'more than 0'}, at most 86400"
        accept = (lambda n: 0 <= n <= 86400) if zero else (lambda n: 0.001 <= n <= 86400)
        return round(reader.number(values.get(key), f"{path}.{key}", default_s, accept, expected) * 1000)

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


_ACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "write_file": (("filename", "body", "mode", "append"), ("filename", "body")),
    "write_tempfile": (("body", "mode", "suffix"), ("body",)),
    "run_command": (("command", "echo", "check"), ("command",)),
    "mkdir": (("path", "parents"), ("path",)),
    "log": (("message", "debug"), ("message",)),
}


def _action(reader: _Reader, node: yaml.Node, path: str, action: fleet_pb2.PreStartAction) -> None:
    values = reader.mapping(node, path, ("action", "args", "ref"), required=("action", "args"))
    if values is None or "action" not in values:
        return
    kind = reader.text(values["action"], f"{path}.action")
    if kind not in _ACTIONS:
        near = difflib.get_close_matches(kind, _ACTIONS, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(_ACTIONS)}"
        reader.wrong(values["action"], f"{path}.action", f"unknown action `{kind[:60]}`; {hint}")
        return
    if "ref" in values:
        action.ref = reader.text(values["ref"], f"{path}.ref")
    if "args" not in values:
        return
    at = f"{path}.args"
    known, required = _ACTIONS[kind]
    args = reader.mapping(values["args"], at, known, required)
    if args is None:
        return
    if kind == "write_file":
        action.write_file.filename = reader.text(args.get("filename"), f"{at}.filename")
        action.write_file.body = reader.body(args.get("body"), f"{at}.body")
        action.write_file.mode = reader.mode(args.get("mode"), f"{at}.mode")
        action.write_file.append = reader.boolean(args.get("append"), f"{at}.append", False)
    elif kind == "write_tempfile":
        action.write_tempfile.body = reader.body(args.get("body"), f"{at}.body")
        action.write_tempfile.mode = reader.mode(args.get("mode"), f"{at}.mode")
        action.write_tempfile.suffix = reader.text(args.get("suffix"), f"{at}.suffix", ".py")
        if "/" in action.write_tempfile.suffix:
            reader.wrong(args["suffix"], f"{at}.suffix", "must not contain `/`")
    elif kind == "run_command":
        words = reader.sequence(args["command"], f"{at}.command", "texts") if "command" in args else []
        action.run_command.command.extend(
            reader.word(word, f"{at}.command[{index}]") for index, word in enumerate(words)
        )
        if "command" in args and isinstance(args["command"], yaml.SequenceNode) and not words:
            reader.wrong(args["command"], f"{at}.command", "must not be empty")
        action.run_command.echo = reader.boolean(args.get("echo"), f"{at}.echo", False)
        action.run_command.check = reader.boolean(args.get("check"), f"{at}.check", True)
    elif kind == "mkdir":
        action.mkdir.path = reader.text(args.get("path"), f"{at}.path")
        action.mkdir.parents = reader.boolean(args.get("parents"), f"{at}.parents", True)
    else:
        action.log.message = reader.body(args.get("message"), f"{at}.message")
        action.log.debug = reader.boolean(args.get("debug"), f"{at}.debug", False)


def _tag(node: yaml.Node) -> str:
    return str(node.tag).rsplit(":", 1)[-1]


def _kind(node: yaml.Node) -> str:
    """What stands there, for people."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    shown = str(node.value)[:60]
    kinds = {"str": "the text", "int": "the number", "float": "the number", "bool": "the truth value"}
    if _tag(node) == "null":
        return "nothing"
    return f"{kinds.get(_tag(node), _tag(node))} `{shown}`"


def _keys(known: tuple[str, ...]) -> str:
    return ("the key " if len(known) == 1 else "the keys ") + ", ".join(f"`{key}`" for key in known)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
