"""`pre_start_actions` of a model definition: the five actions, their arguments, and what refers to what."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from dure.definitions.problems import shown, unknown
from dure.definitions.reader import Reader, kind, tag
from dure.fleet.v1 import fleet_pb2

ACTIONS_MAX = 1000
# Arguments of each action, and those of them that are required.
_ACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "write_file": (("filename", "body", "mode", "append"), ("filename", "body")),
    "write_tempfile": (("body", "mode", "suffix"), ("body",)),
    "run_command": (("command", "echo", "check"), ("command",)),
    "mkdir": (("path", "parents"), ("path",)),
    "log": (("message", "debug"), ("message",)),
}
_REF = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_TEMPLATE = re.compile(r"(?<!\$)\{([A-Za-z_][A-Za-z0-9_-]*)(?:\.(?:out|err))?\}")
_TAKEN_REFS = ("model_path", "port")


def read_actions(
    reader: Reader, node: yaml.Node | None, path: str, command: yaml.Node | None
) -> list[fleet_pb2.PreStartAction]:
    """The actions in order. `command` is what runs after them, and may use all of their results."""
    items = reader.sequence(node, path, "actions") if node is not None else None
    if node is not None and items is not None and len(items) > ACTIONS_MAX:
        reader.wrong(node, path, f"has {len(items)} actions, expected at most {ACTIONS_MAX}")
        items = []
    actions: list[fleet_pb2.PreStartAction] = []
    refs: dict[str, int] = {}
    for index, item in enumerate(items or ()):
        action = fleet_pb2.PreStartAction()
        ref_node = _action(reader, item, f"{path}[{index}]", action)
        actions.append(action)
        if ref_node is None or not action.ref:
            continue
        if action.ref in refs:
            taken = f"`{action.ref}` is the ref of {path}[{refs[action.ref]}] already"
            reader.wrong(ref_node, f"{path}[{index}].ref", taken)
        refs.setdefault(action.ref, index)
    for index, item in enumerate(items or ()):
        _check_order(reader, item, f"{path}[{index}]", path, index, refs)
    return actions


def _action(reader: Reader, node: yaml.Node, path: str, action: fleet_pb2.PreStartAction) -> yaml.Node | None:
    """Fills in an action; returns the node of its `ref`."""
    values = reader.mapping(node, path, ("action", "args", "ref"), required=("action", "args"))
    if values is None:
        return None
    ref = values.get("ref")
    if ref is not None:
        action.ref = _ref(reader, ref, f"{path}.ref")
    if "action" not in values:
        return ref
    name = reader.text(values["action"], f"{path}.action", "?")
    if name not in _ACTIONS:
        if name != "?" and name.strip():
            found = f"unknown action `{shown(name)}`; {unknown(name, _ACTIONS)}"
            reader.wrong(values["action"], f"{path}.action", found)
        return ref
    known, required = _ACTIONS[name]
    args = reader.mapping(values["args"], f"{path}.args", known, required) if "args" in values else None
    if args is not None:
        _FILL[name](reader, args, f"{path}.args", action)
    return ref


def _ref(reader: Reader, node: yaml.Node, path: str) -> str:
    ref = reader.text(node, path)
    if ref.strip() and not _REF.fullmatch(ref):
        found = f"found `{shown(ref)}`, expected a letter or `_`, then letters, digits, `_` and `-`"
        reader.wrong(node, path, found)
        return ""
    if ref in _TAKEN_REFS:
        reader.wrong(node, path, f"`{{{ref}}}` has a meaning of its own already; choose another name")
        return ""
    return ref


def _check_order(
    reader: Reader, node: yaml.Node, path: str, actions: str, index: int, refs: dict[str, int]
) -> None:
    """A result that is used before there is one is surely a mistake."""
    for scalar in _scalars(reader, node):
        for name in dict.fromkeys(_TEMPLATE.findall(scalar.value)):
            later = refs.get(name, -1)
            if later >= index:
                when = "runs later" if later > index else "is this action itself"
                reader.wrong(scalar, path, f"`{{{name}}}` is the result of {actions}[{later}], which {when}")


def _scalars(reader: Reader, node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Values of an action's arguments, two levels deep: deeper nothing is used."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, args in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value != "args":
            continue
        for _, value in args.value if isinstance(args, yaml.MappingNode) else ():
            for leaf in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                reader.spend()
                if isinstance(leaf, yaml.ScalarNode):
                    yield leaf


def _write_file(
    reader: Reader, args: dict[str, yaml.Node], at: str, action: fleet_pb2.PreStartAction
) -> None:
    action.write_file.filename = reader.text(args.get("filename"), f"{at}.filename")
    action.write_file.body = _body(reader, args.get("body"), f"{at}.body")
    action.write_file.mode = _mode(reader, args.get("mode"), f"{at}.mode")
    action.write_file.append = reader.boolean(args.get("append"), f"{at}.append", False)


def _write_tempfile(
    reader: Reader, args: dict[str, yaml.Node], at: str, action: fleet_pb2.PreStartAction
) -> None:
    action.write_tempfile.body = _body(reader, args.get("body"), f"{at}.body")
    action.write_tempfile.mode = _mode(reader, args.get("mode"), f"{at}.mode")
    action.write_tempfile.suffix = reader.text(args.get("suffix"), f"{at}.suffix", ".py")
    if "/" in action.write_tempfile.suffix:
        reader.wrong(args["suffix"], f"{at}.suffix", "must not contain `/`: it is the end of a file name")


def _run_command(
    reader: Reader, args: dict[str, yaml.Node], at: str, action: fleet_pb2.PreStartAction
) -> None:
    node = args.get("command")
    if node is not None:
        words = reader.words(node, f"{at}.command")
        if words is not None and not (words and words[0].strip()):
            reader.wrong(node, f"{at}.command", "must not be empty; the first item is the program")
        action.run_command.command.extend(words or ())
    action.run_command.echo = reader.boolean(args.get("echo"), f"{at}.echo", False)
    action.run_command.check = reader.boolean(args.get("check"), f"{at}.check", True)


def _mkdir(reader: Reader, args: dict[str, yaml.Node], at: str, action: fleet_pb2.PreStartAction) -> None:
    action.mkdir.path = reader.text(args.get("path"), f"{at}.path")
    action.mkdir.parents = reader.boolean(args.get("parents"), f"{at}.parents", True)


def _log(reader: Reader, args: dict[str, yaml.Node], at: str, action: fleet_pb2.PreStartAction) -> None:
    action.log.message = _body(reader, args.get("message"), f"{at}.message")
    action.log.debug = reader.boolean(args.get("debug"), f"{at}.debug", False)


_FILL = {
    "write_file": _write_file,
    "write_tempfile": _write_tempfile,
    "run_command": _run_command,
    "mkdir": _mkdir,
    "log": _log,
}


def _body(reader: Reader, node: yaml.Node | None, path: str) -> str:
    """Content of a file: text, or a list of lines."""
    if node is None:
        return ""
    if isinstance(node, yaml.SequenceNode):
        return "".join(f"{line}\n" for line in reader.words(node, path) or ())
    if isinstance(node, yaml.ScalarNode):
        return reader.scalar(node, path)
    reader.wrong(node, path, f"found {kind(node)}, expected text or a list of lines")
    return ""


def _mode(reader: Reader, node: yaml.Node | None, path: str, default: int = 0o644) -> int:
    """Permission bits: octal digits, quoted or not."""
    if node is None:
        return default
    value = node.value if isinstance(node, yaml.ScalarNode) and tag(node) in ("str", "int") else ""
    match = re.fullmatch(r"(?:0o|0)?([0-7]{3})", value)
    if match is None:
        reader.wrong(node, path, f'found {kind(node)}, expected three octal digits such as "644"')
        return default
    return int(match[1], 8)
