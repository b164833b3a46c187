"""The service definition file: what each runtime runs in, and everything that is wrong with it, at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tomli

from dure.definitions.environ import too_large, wrong_variable
from dure.definitions.problems import PROBLEMS_MAX, Problem, invalid, nearest, shown, unknown
from dure.definitions.toml_lines import key_lines, line_of
from dure.wire.quantities import DEVICES, SHARES, SLOTS, parse_slot

SERVICE_FILE = "service-definition.toml"
SERVICE_BYTES_MAX = 64 * 1024
ARCHITECTURES = ("x86_64", "aarch64")
# The runtimes that come with Dure: what a check without a manager knows.
BUILTIN_RUNTIMES = ("vllm", "sglang", "nim", "huggingface-tgi", "llama-cpp", "modular-max", "cmd", "custom")
IMAGE_CHARACTERS_MAX = 512

_SECTIONS = ("environment", "resource_slots", "environ")
_ENVIRONMENT = ("image", "architecture")
_OTHER_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64", "armv8": "aarch64"}
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class RuntimeSection:
    """What a file says for one runtime; slots in milli-units."""

    image: str = ""
    architecture: str = ""
    slots: Mapping[str, int] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)


ServiceDefinition = Mapping[str, RuntimeSection]


def parse(text: str, file: str, runtimes: Iterable[str]) -> ServiceDefinition:
    """Sections by runtime, in the file's order. Raises InvalidInput with every violation of the file."""
    definition, problems = read(text, file, runtimes)
    if definition is None:
        raise invalid(problems)
    return definition


def read(text: str, file: str, runtimes: Iterable[str]) -> tuple[ServiceDefinition | None, list[Problem]]:
    """The sections if nothing is wrong, else None and at least one problem. `runtimes` are those known."""
    problems: list[Problem] = []
    if not text.strip():
        expected = "expected sections such as [vllm.environment] and [vllm.resource_slots]"
        return None, [Problem(file, 1, "", f"the file is empty; {expected}")]
    try:
        data = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        return None, [_not_toml(error, text, file)]
    except (RecursionError, ValueError):  # a number with more digits than Python converts
        return None, [Problem(file, 1, "", "not TOML: nested too deeply, or a number that is too long")]
    walker = _Walker(file, text, problems)
    known = list(runtimes)
    sections = {name: walker.runtime(name, value, known) for name, value in data.items()}
    if not data:
        walker.wrong((), "has no section; expected some such as [vllm.environment] and [vllm.resource_slots]")
    return (None if problems else sections), sorted(problems, key=lambda problem: problem.line)


def wrong_image(image: str) -> str:
    """What is wrong with an image's path, empty if nothing."""
    if len(image) > IMAGE_CHARACTERS_MAX or not re.fullmatch(r"[A-Za-z0-9][\w.\-/:@+]*", image, re.ASCII):
        example = "expected a path such as `example.com/model-server:latest`"
        return f"found `{shown(image)}`, {example}"
    _, at, digest = image.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        return f"found `{shown(image)}`, expected `sha256:` and 64 hexadecimal digits after the `@`"
    return ""


def wrong_architecture(architecture: str) -> str:
    """What is wrong with a CPU architecture, empty if nothing."""
    if architecture in ARCHITECTURES:
        return ""
    near = _OTHER_ARCHITECTURES.get(architecture.lower()) or nearest(architecture, ARCHITECTURES)
    hint = f"did you mean `{near}`?" if near else f"known: {', '.join(ARCHITECTURES)}"
    return f"unknown architecture `{shown(architecture)}`; {hint}"


class _Walker:
    """Walks the parsed values and collects problems; lines are looked up only when there is one."""

    def __init__(self, file: str, text: str, problems: list[Problem]) -> None:
        self._file = file
        self._text = text
        self._problems = problems
        self._lines: Mapping[tuple[str, ...], int] | None = None

    def wrong(self, path: tuple[str, ...], message: str) -> None:
        if self._lines is None:
            self._lines = key_lines(self._text)
        key = ".".join(part if _NAME.fullmatch(part) else f'"{shown(part)}"' for part in path)
        if len(self._problems) < PROBLEMS_MAX:
            self._problems.append(Problem(self._file, line_of(path, self._lines), key, message))

    def runtime(self, name: str, value: Any, known: list[str]) -> RuntimeSection:
        path = (name,)
        if name not in known:
            if name in _SECTIONS:
                self.wrong(path, f"a section begins with its runtime: write [custom.{name}], or another one")
                return RuntimeSection()
            self.wrong(path, f"unknown runtime `{shown(name)}`; {unknown(name, known)}")
        if not isinstance(value, dict):
            self.wrong(path, f"found {_kind(value)}, expected a section such as [{name}.environment]")
            return RuntimeSection()
        for key in value:
            if key in _SECTIONS:
                continue
            home = _home(key)
            where = f"`{shown(key)}` belongs in [{name}.{home}]" if home else unknown(key, _SECTIONS)
            self.wrong((*path, key), f"unknown section; {where}")
        environment = self._environment(value.get("environment"), (*path, "environment"))
        slots = self._slots(value.get("resource_slots", {}), (*path, "resource_slots"))
        environ = self._environ(value.get("environ", {}), (*path, "environ"))
        return RuntimeSection(*environment, slots, environ)

    def _environment(self, value: Any, path: tuple[str, ...]) -> tuple[str, str]:
        if value is None:
            self.wrong(path, f"is required: [{path[0]}.environment] with `image` and `architecture`")
            return "", ""
        if not self._is_table(value, path):
            return "", ""
        for key in value:
            if key not in _ENVIRONMENT:
                self.wrong((*path, key), f"unknown key; {unknown(key, _ENVIRONMENT)}")
        checks: dict[str, Callable[[str], str]] = {"image": wrong_image, "architecture": wrong_architecture}
        found = {}
        for key, check in checks.items():
            given = value.get(key)
            if given is None:
                self.wrong((*path, key), "is required")
            elif not isinstance(given, str):
                self.wrong((*path, key), f"found {_kind(given)}, expected text (put it in quotes)")
            elif not given.strip():
                self.wrong((*path, key), "must not be empty")
            elif wrong := check(given):
                self.wrong((*path, key), wrong)
            found[key] = given if isinstance(given, str) else ""
        return found["image"], found["architecture"]

    def _slots(self, value: Any, path: tuple[str, ...]) -> Mapping[str, int]:
        slots: dict[str, int] = {}
        if not self._is_table(value, path):
            return slots
        for slot, amount in value.items():
            at = (*path, slot)
            if isinstance(amount, dict):
                inner = next(iter(amount), "")
                if f"{slot}.{inner}" in SLOTS:
                    quoted = f'put the key in quotes, as in "{slot}.{inner}" = "0.5"'
                    self.wrong((*at, inner), f"the dot makes a section of its own of `{slot}`; {quoted}")
                    continue
            if slot not in SLOTS:
                self.wrong(at, f"unknown slot; {unknown(slot, SLOTS)}")
                continue
            if isinstance(amount, bool) or not isinstance(amount, (str, int, float)):
                self.wrong(at, f'found {_kind(amount)}, expected a number or text such as "0.5"')
                continue
            try:
                slots[slot] = parse_slot(slot, amount if isinstance(amount, str) else _plain(amount))
            except ValueError as error:
                self.wrong(at, _one_line(str(error)))
        if SHARES in slots and DEVICES in slots:
            self.wrong(path, f"`{SHARES}` and `{DEVICES}` exclude each other: keep one")
        return slots

    def _environ(self, value: Any, path: tuple[str, ...]) -> Mapping[str, str]:
        environ: dict[str, str] = {}
        if not self._is_table(value, path):
            return environ
        for name, content in value.items():
            at = (*path, name)
            if isinstance(content, str):
                if wrong := wrong_variable(name, content):
                    self.wrong(at, wrong)
                environ[name] = content
            elif isinstance(content, (dict, list)):
                self.wrong(at, f"found {_kind(content)}, expected text")
            else:
                quoted = f'"{str(content).lower() if isinstance(content, bool) else content}"'
                self.wrong(at, f"found {_kind(content)}, expected text: put it in quotes, {shown(quoted)}")
        if wrong := too_large(environ.items()):
            self.wrong(path, wrong)
        return environ

    def _is_table(self, value: Any, path: tuple[str, ...]) -> bool:
        if isinstance(value, dict):
            return True
        section = f"[{path[0]}.{path[1]}]"
        twice = f" (written as [{section}]; write {section})" if isinstance(value, list) else ""
        self.wrong(path, f"found {_kind(value)}, expected a section {section}{twice}")
        return False


def _home(key: str) -> str:
    """The section that a key belongs in which stands beside the sections."""
    if key in _ENVIRONMENT:
        return "environment"
    if key in SLOTS or key == "cuda":
        return "resource_slots"
    return "environ" if re.fullmatch(r"[A-Z_][A-Z0-9_]*", key) else ""


def _plain(number: int | float) -> str:
    """A number as decimal text, without an exponent where there is another way."""
    text = repr(number) if isinstance(number, int) or abs(number) < 1e15 else f"{number:f}"
    return f"{number:.9f}" if "e" in text else text


def _one_line(text: str) -> str:
    return text if text.isprintable() else shown(text)


def _kind(value: Any) -> str:
    """What stands there, for people."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return f"the truth value `{str(value).lower()}`"
    if isinstance(value, (int, float)):
        return f"the number `{shown(_digits(value))}`"
    if isinstance(value, str):
        return f"the text `{shown(value)}`"
    return f"the date or time `{value}`"


def _digits(value: int | float) -> str:
    # Python refuses to print integers of thousands of digits.
    return str(value) if isinstance(value, float) or abs(value) < 10**60 else "1000..."


def _not_toml(error: tomli.TOMLDecodeError, text: str, file: str) -> Problem:
    message = re.sub(r" \(at (?:line \d+, column \d+|end of document)\)$", "", str(error))
    match = re.search(r"\(at line (\d+),", str(error))
    line = int(match[1]) if match else max(1, len(text.rstrip().splitlines()))
    hint = ""
    if "Invalid value" in message:
        hint = " (text goes in quotes)"
    elif "Cannot overwrite" in message or "twice" in message or "Cannot declare" in message:
        hint = " (it stands in the file before)"
    return Problem(file, line, "", f"not TOML: {shown_message(message)}{hint}")


def shown_message(message: str) -> str:
    line = message if message.isprintable() else message.encode("unicode_escape").decode("ascii")
    return line[:200]
