"""Processes of the programs: started, found again by their pid files, signalled, awaited.

A process is held by a pidfd: a signal can never reach another one that was given the same pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_BYTES = 4096
TAIL_LINES = 15


class Process:
    """A process that runs, or ran: our child, or one that somebody else started."""

    def __init__(self, pid: int, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        # A pidfd is readable once the process has ended.
        self._loop.add_reader(pidfd, self._on_end)

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._child is not None:
            self._child.wait()
        self._ended.set()

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    async def ended(self) -> None:
        await self._ended.wait()

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    @property
    def how(self) -> str:
        """How it ended, for people."""
        code = self._child.returncode if self._child is not None else None
        if code is None:
            return "has ended"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    @property
    def succeeded(self) -> bool:
        return self._child is not None and self._child.returncode == 0

    def let_go(self) -> None:
        """Stops watching a process that goes on."""
        if self.alive:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._ended.set()


def spawn(arguments: Sequence[str], environ: Mapping[str, str], output: Path) -> Process:
    """Runs `dure ARGUMENTS` in a process session of its own, so that a terminal's Ctrl-C reaches only us.

    What it prints goes to `output`, anew.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "wb") as sink:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "dure.client.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**os.environ, **environ},
            start_new_session=True,
        )
    return Process(child.pid, os.pidfd_open(child.pid), child)


def find(pid_file: Path, lock: Path) -> Process | None:
    """The process that a pid file names, if it runs and really holds the program's lock file."""
    try:
        pid = int(pid_file.read_text(encoding="ascii"))
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return None
    if not _holds(pid, lock):
        os.close(pidfd)
        return None
    return Process(pid, pidfd, None)


def _holds(pid: int, lock: Path) -> bool:
    try:
        wanted = lock.stat()
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{descriptor}"), wanted):
                return True
    return False


def last_lines(*paths: Path) -> list[str]:
    """The newest lines of log files, those of JSON as `level message`."""
    lines: list[str] = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
                lines += file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        except FileNotFoundError:
            continue
    return [_readable(line) for line in lines]


def _readable(line: str) -> str:
    try:
        entry = json.loads(line)
        return f"{entry['level']}: {entry['message']}"
    except (ValueError, KeyError, TypeError):
        return line
