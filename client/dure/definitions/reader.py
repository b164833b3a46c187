"""Walks a YAML text as nodes, which know their lines, and collects what is wrong with it.

Nothing here raises for what stands in the file: every accessor records a problem and returns a value that
one can go on with, so that one pass finds all errors. A key without a value counts as not given. Aliases
and merge keys work; what they expand to is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import yaml

from dure.definitions.problems import PROBLEMS_MAX, Problem, nearest, shown, unknown

# What aliases may expand to: far more than a file of the largest size needs by itself.
NODES_MAX, CHARACTERS_MAX = 50_000, 1 << 20
_FLOAT_WITHOUT_DOT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


class TooMuch(Exception):
    """The file expands to more than anybody writes. `Reader.walk` turns it into a problem."""


class Reader:
    """Problems of one file. `homes` says where a key belongs that stands in the wrong place."""

    def __init__(self, file: str, homes: Mapping[str, str] | None = None) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._homes = homes or {}
        self._nodes = self._characters = 0
        self._constructor = yaml.constructor.SafeConstructor()

    def wrong(self, at: yaml.Node | int, key: str, message: str) -> None:
        """Records a problem, up to PROBLEMS_MAX."""
        line = at if isinstance(at, int) else at.start_mark.line + 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Problem(self.file, line, _sendable(key), _sendable(message)))

    def load(self, text: str, expected: str) -> yaml.Node | None:
        """The root node; None, with a problem, if there is none. `expected` completes the sentence."""
        if not text.strip():
            self.wrong(1, "", f"the file is empty; expected {expected}")
            return None
        try:
            # An alias bomb is small as nodes: composing shares them.
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            self._not_yaml(error, text)
            return None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, int(error.position)) + 1
            code = error.character if isinstance(error.character, int) else ord(error.character)
            self.wrong(line, "", f"not YAML: the character U+{code:04X} is not allowed")
            return None
        except (RecursionError, ValueError, OverflowError):
            # Escapes such as "\UFFFFFFFF" make the scanner itself stumble.
            self.wrong(1, "", "not YAML: nested too deeply, or an escape that is no character")
            return None
        if root is None:
            self.wrong(1, "", f"the file has no content; expected {expected}")
        return root

    def walk(self, take: Callable[[], None]) -> None:
        """Runs `take`, which calls the accessors below, and bounds what it expands."""
        try:
            take()
        except TooMuch:
            self.wrong(1, "", "its aliases (`*name`) expand to too much; write it out, or in less")

    def mapping(
        self, node: yaml.Node, path: str, known: Sequence[str], required: Sequence[str] = ()
    ) -> dict[str, yaml.Node] | None:
        """The values by key, None if the node is not a mapping."""
        entries = self.entries(node, path, f"a mapping with {_keys(known)}")
        if entries is None:
            return None
        values: dict[str, yaml.Node] = {}
        empty: set[str] = set()
        misspelt: set[str] = set()
        for key, (key_node, value) in entries.items():
            if key not in known:
                self.wrong(key_node, join(path, shown(key)), self._unknown(key, path, known))
                # What stands below a misspelt key is looked at, too: it is wrong in the same answer.
                near = nearest(key, known)
                if near is not None and near not in entries and not is_null(value):
                    values.setdefault(near, value)
                    misspelt.add(near)
            elif is_null(value):
                empty.add(key)
                if key in required:
                    self.wrong(key_node, join(path, key), "is required, but has no value")
            else:
                values[key] = value
        for key in required:
            if key in misspelt or (key not in values and key not in empty):
                self.wrong(node, join(path, key), "is required")
        return values

    def entries(
        self, node: yaml.Node, path: str, expected: str
    ) -> dict[str, tuple[yaml.Node, yaml.Node]] | None:
        """Key node and value by key, merge keys resolved; None if the node is not a mapping."""
        self.spend()
        if not isinstance(node, yaml.MappingNode):
            self.wrong(node, path, f"found {kind(node)}, expected {expected}")
            return None
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key_node, value in node.value:
            self.spend()
            if not isinstance(key_node, yaml.ScalarNode):
                self.wrong(key_node, path, f"found {kind(key_node)} as a key, expected a word")
            elif key_node.tag == "tag:yaml.org,2002:merge":
                merged.append(value)
            elif key_node.value in found:
                first = found[key_node.value][0].start_mark.line + 1
                again = f"the key stands here twice; the first time on line {first}"
                self.wrong(key_node, join(path, shown(key_node.value)), again)
            else:
                found[key_node.value] = (key_node, value)
        for value in merged:
            self._merge(value, path, found, [node])
        return found

    def _merge(
        self,
        node: yaml.Node,
        path: str,
        found: dict[str, tuple[yaml.Node, yaml.Node]],
        above: list[yaml.Node],
    ) -> None:
        """`<<`: keys of another mapping that are not given here."""
        self.spend()
        if any(node is one for one in above):
            self.wrong(node, join(path, "<<"), "merges itself")
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._merge(item, path, found, [*above, node])
        elif isinstance(node, yaml.MappingNode):
            deeper = []
            for key_node, value in node.value:
                self.spend()
                if key_node.tag == "tag:yaml.org,2002:merge":
                    deeper.append(value)
                elif isinstance(key_node, yaml.ScalarNode):
                    found.setdefault(key_node.value, (key_node, value))
            for value in deeper:
                self._merge(value, path, found, [*above, node])
        else:
            self.wrong(node, join(path, "<<"), f"found {kind(node)}, expected a mapping to merge")

    def sequence(self, node: yaml.Node, path: str, of: str) -> list[yaml.Node] | None:
        """The items, None if the node is not a list."""
        self.spend()
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        hint = "; begin each with `- `" if isinstance(node, yaml.MappingNode) else ""
        self.wrong(node, path, f"found {kind(node)}, expected a list of {of}{hint}")
        return None

    def text(self, node: yaml.Node | None, path: str, default: str = "") -> str:
        """A non-empty string; what YAML takes for a number, a date or a truth value must be quoted."""
        if node is None:
            return default
        if not isinstance(node, yaml.ScalarNode) or tag(node) != "str":
            self.wrong(node, path, f"found {kind(node)}, expected text{_text_hint(node)}")
            return default
        if not node.value.strip():
            self.wrong(node, path, "must not be empty")
        return self._clean(node, path)

    def word(self, node: yaml.Node, path: str) -> str:
        """An argument: text, or a number as it is written; may be empty."""
        if not isinstance(node, yaml.ScalarNode) or tag(node) not in ("str", "int", "float"):
            self.wrong(node, path, f"found {kind(node)}, expected text{_text_hint(node)}")
            self.spend()
            return "?"
        return self._clean(node, path)

    def words(self, node: yaml.Node, path: str) -> list[str] | None:
        """A list of arguments, None if it is not a list."""
        items = self.sequence(node, path, "texts")
        if items is None:
            return None
        return [self.word(item, f"{path}[{index}]") for index, item in enumerate(items)]

    def scalar(self, node: yaml.Node, path: str) -> str:
        """Any single value, as it is written."""
        if isinstance(node, yaml.ScalarNode):
            return self._clean(node, path)
        self.spend()
        self.wrong(node, path, f"found {kind(node)}, expected text")
        return ""

    def boolean(self, node: yaml.Node | None, path: str, default: bool) -> bool:
        if node is None:
            return default
        self.spend()
        value = node.value.lower() if isinstance(node, yaml.ScalarNode) else ""
        if tag(node) == "bool" and value in ("true", "yes", "on", "false", "no", "off"):
            return value in ("true", "yes", "on")
        hint = " without quotes" if tag(node) == "str" and value in ("true", "false") else ""
        self.wrong(node, path, f"found {kind(node)}, expected true or false{hint}")
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
        self.spend()
        value = self._number(node)
        if value is None or value != value or not accept(value):
            self.wrong(node, path, f"found {kind(node)}, expected {expected}{_number_hint(node)}")
            return default
        return value

    def integer(self, node: yaml.Node | None, path: str, default: int, low: int, high: int) -> int:
        expected = f"a whole number from {low} to {high}"
        value = self.number(node, path, default, lambda n: isinstance(n, int) and low <= n <= high, expected)
        return int(value)

    def _number(self, node: yaml.Node) -> int | float | None:
        if not isinstance(node, yaml.ScalarNode) or _odd_number(node):
            return None
        try:
            if tag(node) == "int":
                return int(self._constructor.construct_yaml_int(node))
            if tag(node) == "float":
                return float(self._constructor.construct_yaml_float(node))
            if node.style is None and _FLOAT_WITHOUT_DOT.fullmatch(node.value):
                return float(node.value)
        except (ValueError, OverflowError):  # `!!int x`, or more digits than Python converts
            return None
        return None

    def _clean(self, node: yaml.ScalarNode, path: str) -> str:
        self.spend(len(node.value))
        value = str(node.value)
        if "\0" in value:
            self.wrong(node, path, "must not contain a NUL character")
        elif _sendable(value) != value:
            self.wrong(node, path, "has an escape that is not a character of its own (a lone surrogate)")
        return _sendable(value)

    def spend(self, characters: int = 0) -> None:
        """Counts a node that is looked at. Raises TooMuch."""
        self._nodes += 1
        self._characters += characters
        if self._nodes > NODES_MAX or self._characters > CHARACTERS_MAX:
            raise TooMuch

    def _unknown(self, key: str, path: str, known: Sequence[str]) -> str:
        home = self._homes.get(key)
        if home is not None and not re.fullmatch(home.replace("[]", r"\[\d+\]"), path):
            return f"unknown key here; `{key}` belongs in `{home.replace('[]', '[0]')}`"
        far = nearest(key, self._homes)
        if far is not None and nearest(key, known) is None:
            return f"unknown key; did you mean `{far}`, in `{self._homes[far].replace('[]', '[0]')}`?"
        return f"unknown key; {unknown(key, known)}"

    def _not_yaml(self, error: yaml.MarkedYAMLError, text: str) -> None:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or error.context or "cannot be read"
        if "found character '\\t'" in problem or (mark and _tab_at(text, mark.index)):
            problem = "found a tab where only spaces may indent"
        elif "another document" in problem:
            problem = "a second document begins here (`---`), expected one document"
        elif "mapping values are not allowed" in problem:
            problem += " (a `: ` inside of a text: put the text in quotes; or wrong indentation)"
        self.wrong(line, "", f"not YAML: {problem}")


def tag(node: yaml.Node) -> str:
    return str(node.tag).rsplit(":", 1)[-1]


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and tag(node) == "null"


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def kind(node: yaml.Node) -> str:
    """What stands there, for people."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if is_null(node):
        return "nothing"
    words = {
        "str": "the text", "int": "the number", "float": "the number", "bool": "the truth value",
        "timestamp": "the date",
    }  # fmt: skip
    return f"{words.get(tag(node), 'the value')} `{shown(str(node.value))}`"


def _keys(known: Sequence[str]) -> str:
    return ("the key " if len(known) == 1 else "the keys ") + ", ".join(f"`{key}`" for key in known)


def _text_hint(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return " (put it in quotes)"
    if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
        key, value = node.value[0]
        # `{port}` without quotes is a mapping to YAML.
        if isinstance(key, yaml.ScalarNode) and is_null(value) and not value.value:
            return f' (a brace begins one: put it in quotes, "{{{shown(key.value)}}}")'
    return ""


def _odd_number(node: yaml.ScalarNode) -> bool:
    """What YAML 1.1 takes for a number that nobody means: `80:30` is 4830, `0200` is 128."""
    return ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value) is not None


def _number_hint(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return ""
    if tag(node) == "str" and node.style is not None and re.fullmatch(r"[-+]?[\d.]+", node.value):
        return " (without quotes)"
    if tag(node) == "int" and _odd_number(node) and ":" not in node.value:
        return " (a zero in front makes it octal)"
    return ""


def _tab_at(text: str, index: int) -> bool:
    """Whether the indentation of the line of `index` has a tab."""
    start = text.rfind("\n", 0, index) + 1
    line = text[start : start + 200]
    return "\t" in line[: len(line) - len(line.lstrip())]


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
