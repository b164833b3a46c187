"""Checks the definition files of a folder, wherever the folder is: the caller reads, this judges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dure.definitions import model, service
from dure.definitions.problems import Problem, decode


@dataclass(frozen=True)
class Report:
    """What the definition files of a folder say, and everything that is wrong with them."""

    problems: list[Problem]
    files: list[str]
    definition: model.Definition | None = None
    service: service.ServiceDefinition | None = None
    text: str = ""
    missing: list[str] = field(default_factory=list)


def file_names(model_definition_path: str = "") -> list[tuple[str, int]]:
    """Files to read for `check`, each with the most bytes to take of it: one more than it may have."""
    names = [model_definition_path] if model_definition_path else list(model.DEFAULT_NAMES)
    limits = [(name, model.DEFINITION_BYTES_MAX + 1) for name in names]
    return [*limits, (service.SERVICE_FILE, service.SERVICE_BYTES_MAX + 1)]


def check(files: Mapping[str, bytes], runtimes: Iterable[str], model_definition_path: str = "") -> Report:
    """`files` has the content of those of `file_names` that are there; `runtimes` are those known.

    A folder needs no service definition, unless the model store is to run it: then it is in `missing`.
    """
    names = [model_definition_path] if model_definition_path else list(model.DEFAULT_NAMES)
    found = next((name for name in names if name in files), None)
    problems: list[Problem] = []
    read: list[str] = []
    missing: list[str] = []
    definition, text = None, ""
    if found is None:
        missing.append(names[0])
        problems.append(Problem(names[0], 0, "", no_definition(model_definition_path)))
    else:
        read.append(found)
        decoded = decode(files[found], found, model.DEFINITION_BYTES_MAX)
        if isinstance(decoded, Problem):
            problems.append(decoded)
        else:
            text = decoded
            definition, wrong = model.read(decoded, found)
            problems += wrong
    sections = None
    if service.SERVICE_FILE in files:
        read.append(service.SERVICE_FILE)
        decoded = decode(files[service.SERVICE_FILE], service.SERVICE_FILE, service.SERVICE_BYTES_MAX)
        if isinstance(decoded, Problem):
            problems.append(decoded)
        else:
            sections, wrong = service.read(decoded, service.SERVICE_FILE, runtimes)
            problems += wrong
    else:
        missing.append(service.SERVICE_FILE)
    return Report(problems, read, definition, sections, text, missing)


def no_definition(model_definition_path: str = "") -> str:
    """Why there is no model definition to read."""
    if model_definition_path:
        return "there is no such file in the folder"
    other = " or ".join(f"`{name}`" for name in model.DEFAULT_NAMES[1:])
    return f"there is no such file in the folder, nor {other}; the runtime `custom` needs one"
