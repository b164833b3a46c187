"""The agent under test, as a process that can be killed and started again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_LIMIT_S = 15.0
_TAIL_BYTES = 2_000


def filled(arguments: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """The arguments with `{manager}`, `{join_token}`, `{name}` and `{data_dir}` replaced."""
    result = []
    for argument in arguments:
        for name, value in values.items():
            argument = argument.replace("{" + name + "}", value)
        result.append(argument)
    return result


class Program:
    """Signals go to the process that was started: a wrapper has to exec the agent."""

    def __init__(self, arguments: Sequence[str], values: Mapping[str, str], log: Path) -> None:
        self._arguments = filled(arguments, values)
        self._environ = {
            **os.environ,
            "DURE_MANAGER": values["manager"],
            "DURE_JOIN_TOKEN": values["join_token"],
            "DURE_AGENT_NAME": values["name"],
            "DURE_DATA_DIR": values["data_dir"],
        }
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises OSError if there is no such program."""
        with open(self._log, "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                start_new_session=True,
            )

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def end(self) -> str:
        """How it ended and what it said last, for people; empty while it runs."""
        if self._process is None or self._process.returncode is None:
            return ""
        code = self._process.returncode
        how = f"exited with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        said = self.said()
        return f"its program {how}" + (f": {said}" if said else "")

    def said(self) -> str:
        """The end of what it wrote to its standard output and error."""
        try:
            with open(self._log, "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return log.read().decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    async def kill(self) -> None:
        await self.stop(signal.SIGKILL)

    async def stop(self, number: signal.Signals) -> None:
        """By force if it does not heed the signal."""
        process = self._process
        if process is None:
            return
        for one in (number, signal.SIGKILL):
            if process.returncode is not None:
                return
            process.send_signal(one)
            try:
                async with asyncio.timeout(STOP_LIMIT_S):
                    await process.wait()
            except TimeoutError:
                continue
