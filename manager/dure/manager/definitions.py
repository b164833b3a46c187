"""Definition files of stored folders: read here, judged by `dure.definitions`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dure.definitions import check
from dure.manager import schema
from dure.manager.folders import Folders
from dure.wire.errors import InvalidInput, Violation


async def check_folder(
    folders: Folders, folder: schema.Folder, runtimes: Sequence[str], model_definition_path: str = ""
) -> check.Report:
    """Everything that is wrong with the files is in the report. Raises InvalidInput for a bad path only."""
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
    # Parsing the largest file takes the better part of a second: not on the loop.
    return await asyncio.to_thread(check.check, contents, runtimes, model_definition_path)
