"""Logs of kernels that are gone: kept for those who ask why, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dure.agent.shim.log import BEFORE, NEWEST

KEPT_MAX = 200
KEPT_BYTES_MAX = 512 * 1024 * 1024
KEPT_S = 7 * 24 * 3600.0
PRUNE_INTERVAL_S = 3600.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """The log of one kernel. Times are Unix seconds."""

    uid: str
    kept_at: float
    size_bytes: int


def surplus(kept: Iterable[Kept], now: float) -> list[str]:
    """Uids of those that must go: too old, or beyond the newest that there is room for."""
    gone: list[str] = []
    count = size_bytes = 0
    for one in sorted(kept, key=lambda one: one.kept_at, reverse=True):
        count += 1
        size_bytes += one.size_bytes
        if count > KEPT_MAX or size_bytes > KEPT_BYTES_MAX or now - one.kept_at > KEPT_S:
            gone.append(one.uid)
            size_bytes -= one.size_bytes
            count -= 1
    return gone


class LogArchive:
    """`<home>/logs/<kernel uid>/`: the log as it was in the kernel's folder. Blocks on files only."""

    def __init__(self, home: Path) -> None:
        self._kernels = home / "kernels"
        self._archive = home / "logs"
        # Kernels that go at one moment are kept by as many threads.
        self._changing = threading.Lock()

    def locate(self, uid: str) -> Path | None:
        """The folder that holds the log of a kernel now."""
        for folder in (self._archive / uid, self._kernels / uid):
            if folder.is_dir():
                return folder
        return None

    def keep(self, uid: str, folder: Path) -> None:
        """Links the log of a kernel that goes: readers find it whole in one place or in the other.

        Raises OSError."""
        with self._changing:
            self._keep(uid, folder)
        self.prune()

    def _keep(self, uid: str, folder: Path) -> None:
        place, part = self._archive / uid, self._archive / f"{uid}.part"
        shutil.rmtree(part, ignore_errors=True)
        self._archive.mkdir(parents=True, exist_ok=True, mode=0o700)
        part.mkdir(mode=0o700)
        for name in (BEFORE, NEWEST):
            with contextlib.suppress(FileNotFoundError):
                os.link(folder / name, part / name)
        if not any(part.iterdir()):
            # It never came to write anything.
            part.rmdir()
            return
        shutil.rmtree(place, ignore_errors=True)
        os.rename(part, place)

    def prune(self) -> None:
        """Drops what is beyond the bounds. Raises OSError."""
        with self._changing:
            if not self._archive.is_dir():
                return
            kept = [
                Kept(one.name, one.stat().st_mtime, sum(file.stat().st_size for file in one.iterdir()))
                for one in self._archive.iterdir()
            ]
            for uid in surplus(kept, time.time()):
                shutil.rmtree(self._archive / uid, ignore_errors=True)

    async def run(self) -> None:
        """Lets go of what grows old. Runs until it is cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.prune)
            except OSError as error:
                _log.warning("cannot look through the kept logs: %s", error)
            await asyncio.sleep(PRUNE_INTERVAL_S)
