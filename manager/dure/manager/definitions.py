"""Definition files of stored folders: read here, judged by `dure.definitions`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from dure.definitions import check, model, service
from dure.definitions.problems import Problem
from dure.manager import runtimes, schema
from dure.manager.folders import Folders
from dure.v1 import catalog_pb2, endpoint_pb2
from dure.wire.errors import InvalidInput, Violation

# Files of the largest size, all different: 40 MiB of them.
REPORTS_MAX = 128


@dataclass(frozen=True)
class Files:
    """Definition files of a model folder, as far as a runtime reads them."""

    definition: model.Definition | None
    path: str
    text: str
    section: service.RuntimeSection
    ggufs: list[str]


async def check_folder(
    folders: Folders, folder: schema.Folder, known: Sequence[str], model_definition_path: str = ""
) -> check.Report:
    """Everything that is wrong with the files is in the report, which nobody may change; `known` are
    runtimes. Raises InvalidInput for a bad path only."""
    contents: dict[str, bytes] = {}
    for name, bytes_max in check.file_names(model_definition_path):
        try:
            content = await folders.read_small(folder.uid, name, bytes_max)
        except InvalidInput as error:
            field = "model_definition_path" if name == model_definition_path else name
            raise InvalidInput.of(
                [Violation(field, wrong.description) for wrong in error.violations]
            ) from error
        if content is not None:
            contents[name] = content
    # Parsing the largest file takes seconds: not on the loop, and not again for the same content.
    return await asyncio.to_thread(_report, tuple(contents.items()), tuple(known), model_definition_path)


@functools.lru_cache(maxsize=REPORTS_MAX)
def _report(
    contents: tuple[tuple[str, bytes], ...], known: tuple[str, ...], model_definition_path: str
) -> check.Report:
    return check.check(dict(contents), known, model_definition_path)


async def read_files(
    folders: Folders,
    folder: schema.Folder,
    asked: endpoint_pb2.Endpoint,
    runtime: catalog_pb2.Runtime,
    known: Sequence[str],
    violations: list[Violation],
) -> Files | None:
    """The model definition if the runtime reads one, the service definition if there is one."""
    try:
        report = await check_folder(folders, folder, known, asked.model_definition_path)
    except InvalidInput as error:
        for wrong in error.violations:
            field = f"endpoint.{wrong.field}" if wrong.field == "model_definition_path" else wrong.field
            violations.append(Violation(field, wrong.description))
        return None
    reads = runtime.reads_model_definition
    problems = [p for p in report.problems if reads or p.file == service.SERVICE_FILE]
    violations.extend(
        problem.violation if problem.file in report.files else _missing(problem, folder.name)
        for problem in problems
    )
    if problems:
        return None
    section = (report.service or {}).get(asked.runtime, service.RuntimeSection())
    definition = report.definition if reads else None
    ggufs = await _ggufs(folders, folder) if _wants_gguf(runtime, asked) else []
    return Files(
        definition,
        report.files[0] if definition is not None else "",
        report.text if reads else "",
        section,
        ggufs,
    )


def _missing(problem: Problem, folder: str) -> Violation:
    """What to do about a file that is not there is to upload it."""
    return Violation(
        problem.place, f"folder `{folder}`: {problem.message}; upload it: dure folder upload {folder} FILE"
    )


def _wants_gguf(runtime: catalog_pb2.Runtime, asked: endpoint_pb2.Endpoint) -> bool:
    commands = (runtime.start_command, asked.service.start_command)
    return any(runtimes.FIRST_GGUF in word for start in commands for word in (*start.args, start.line))


async def _ggufs(folders: Folders, folder: schema.Folder) -> list[str]:
    """By name, those at the top first."""
    found = [facts.path for facts in await folders.files(folder.uid) if facts.path.lower().endswith(".gguf")]
    return sorted(found, key=lambda path: (path.count("/"), path))
