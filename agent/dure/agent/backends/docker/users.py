"""Whose a container's home is: the user of its image as numbers, so that what the agent puts there can be
read."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

PASSWD_BYTES_MAX = 1024 * 1024


def numbers(user: str, passwd: str = "") -> tuple[int, int] | None:
    """Uid and gid of `name[:group]` as images say it, by the image's own table; None if that does not
    tell."""
    name, _, group = user.partition(":")
    if not name:
        return 0, 0
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) > 3 and name in (fields[0], fields[2]) and fields[2].isdecimal():
            gid = group if group.isdecimal() else fields[3]
            return int(fields[2]), int(gid) if gid.isdecimal() else 0
    if name.isdecimal():
        return int(name), int(group) if group.isdecimal() else 0
    return None


def is_plain(user: str) -> bool:
    """Whether the numbers follow from the words alone."""
    name, _, group = user.partition(":")
    return not name or (name.isdecimal() and group.isdecimal())


def unpack(pieces: Iterable[bytes]) -> str:
    """The one file of an archive, as text; empty if it is too large or none."""
    data = b""
    for piece in pieces:
        data += piece
        if len(data) > PASSWD_BYTES_MAX:
            return ""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                return file.read().decode(errors="replace")
    return ""


def open_to_all(folder: str) -> None:
    """Lets anybody make files in a folder that a container may write to: it belongs to the manager's user,
    not to the image's. Above it, only the manager's user may enter. What is in it already stays whose it
    is."""
    if os.geteuid() == 0:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.fchmod(descriptor, os.fstat(descriptor).st_mode | 0o777)
        finally:
            os.close(descriptor)


def give(folder: Path, owner: tuple[int, int] | None) -> None:
    """Makes a folder and all in it the user's. Where that is not known, or not allowed, anybody may write
    there: above it, only the agent's user may enter."""
    if owner is None or os.geteuid() != 0:
        folder.chmod(0o777)
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, *owner, follow_symlinks=False)
