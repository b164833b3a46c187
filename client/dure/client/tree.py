"""Which local files an upload takes, and what a path inside a folder is: checked before anything is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dure.wire.errors import InvalidInput, Violation

FILES_MAX = 100_000
_LEFT_OUT = {".git"}


@dataclass(frozen=True)
class LocalFile:
    """A file to upload: where it lies, its path in the folder, its facts."""

    source: Path
    path: str
    size_bytes: int
    mode: int


def files_of(source: Path, to: str = "", *, follow_symlinks: bool = False) -> list[LocalFile]:
    """What an upload of `source` consists of, by path.

    A directory gives its content, hidden files included, `.git` left out; a file gives itself. `to` is a
    path in the folder: a sub-folder for a directory; the new path for a file (ending in `/`: a sub-folder).
    Links are followed as long as they stay inside `source`. Raises InvalidInput, listing every bad file.
    """
    if not source.exists():
        raise InvalidInput(f"{source}: no such file or directory")
    if to.strip("/"):
        inside(to.strip("/"), "--to")
    if source.is_file():
        into_folder = not to or to.endswith("/")
        path = f"{to.strip('/')}/{source.name}".lstrip("/") if into_folder else to.strip("/")
        return [_file(source, path)]
    if not source.is_dir():
        raise InvalidInput(f"{source} is neither a file nor a directory")
    base = source.resolve()
    violations: list[Violation] = []
    files: list[LocalFile] = []
    for entry in _walk(source, base, [base], follow_symlinks, violations):
        relative = entry.relative_to(source).as_posix()
        try:
            files.append(_file(entry, f"{to.strip('/')}/{relative}".lstrip("/")))
        except (OSError, InvalidInput) as error:
            violations.append(Violation(str(entry), getattr(error, "strerror", None) or str(error)))
        if len(files) > FILES_MAX:
            raise InvalidInput(f"{source} has more than {FILES_MAX} files: pack them, or upload it in parts")
    if violations:
        raise InvalidInput.of(violations)
    return sorted(files, key=lambda file: file.path)


def inside(path: str, field: str = "path") -> str:
    """The path, if it is one inside a folder. Raises InvalidInput."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path or "\\" in path:
        raise InvalidInput.of([Violation(field, f"`{path[:200]}` is not a path inside a folder")])
    return path


def _walk(
    directory: Path, base: Path, above: list[Path], follow: bool, violations: list[Violation]
) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        violations.append(Violation(str(directory), error.strerror or str(error)))
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name in _LEFT_OUT:
            continue
        if entry.is_symlink():
            target = path.resolve()
            if not target.exists():
                violations.append(
                    Violation(str(path), f"a link to {os.readlink(path)}, which does not exist")
                )
                continue
            if not follow and not target.is_relative_to(base):
                violations.append(
                    Violation(
                        str(path),
                        f"a link out of {base}, to {target}; --follow-symlinks uploads what it points to",
                    )
                )
                continue
        if entry.is_dir():
            resolved = path.resolve()
            if resolved in above:
                violations.append(Violation(str(path), "a link to a directory that contains it"))
                continue
            yield from _walk(path, base, [*above, resolved], follow, violations)
        elif entry.is_file():
            yield path
        else:
            violations.append(Violation(str(path), "neither a file nor a directory"))


def _file(source: Path, path: str) -> LocalFile:
    facts = source.stat()
    if not os.access(source, os.R_OK):
        raise InvalidInput(f"cannot read {source}: permission denied")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput("its name is not UTF-8") from error
    if "\\" in path:
        raise InvalidInput("its name has a backslash")
    # What the manager would refuse: said before anything is sent.
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise InvalidInput(f"its name has control characters: {path!r}")
    if len(path.encode()) > 1024 or path.count("/") >= 32:
        raise InvalidInput("its path is longer than 1024 bytes or deeper than 32 folders")
    return LocalFile(source, path, facts.st_size, facts.st_mode & 0o777)
