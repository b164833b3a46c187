"""The check of a local directory's definition files: no manager needed."""

from __future__ import annotations

from pathlib import Path

from dure.client.tree import inside
from dure.definitions.check import check, file_names
from dure.definitions.service import BUILTIN_RUNTIMES
from dure.v1.folder_pb2 import CheckFolderResponse
from dure.wire.errors import NotFound


def check_directory(directory: Path, model_definition_path: str = "") -> CheckFolderResponse:
    """What CheckFolder would answer if `directory` were the folder; it knows the built-in runtimes."""
    if not directory.is_dir():
        raise NotFound(f"there is no directory `{directory}`")
    if model_definition_path:
        inside(model_definition_path, "--definition")
    contents: dict[str, bytes] = {}
    for name, bytes_max in file_names(model_definition_path):
        path = directory / name
        if path.is_file():
            with open(path, "rb") as file:
                contents[name] = file.read(bytes_max)
    report = check(contents, BUILTIN_RUNTIMES, model_definition_path)
    response = CheckFolderResponse(files=report.files)
    for problem in report.problems:
        response.problems.add(file=problem.file, line=problem.line, key=problem.key, message=problem.message)
    return response
