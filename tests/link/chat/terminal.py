"""A pseudo-terminal with a program in it, and somebody who types."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")


@dataclass(eq=False)
class Terminal:
    """What stands on it, and the process that it belongs to."""

    master: int
    process: asyncio.subprocess.Process
    data: bytearray = field(default_factory=bytearray)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _read_to: int = 0

    @property
    def text(self) -> str:
        """All that was shown, without colours and movements."""
        return _CONTROLS.sub("", self.data.decode("utf-8", "replace"))

    def readable(self) -> None:
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # what Linux says when the other side is closed
            piece = b""
        if not piece:
            asyncio.get_running_loop().remove_reader(self.master)
        self.data += piece
        self._changed.set()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    async def sees(self, text: str, within_s: float = 30.0) -> None:
        """Waits for a text beyond what was seen before."""
        try:
            async with asyncio.timeout(within_s):
                while (at := self.text.find(text, self._read_to)) < 0:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"no {text!r} in {self.text[self._read_to :]!r}") from None
        self._read_to = at + len(text)

    async def types_until(self, key: str, text: str, times: int = 15) -> None:
        """Types a key, again every two seconds, as people do: a key in the moment between the line editor's
        prompt and its first look at the keyboard is taken with the next one only."""
        for left in reversed(range(times)):
            self.type(key)
            try:
                await self.sees(text, 2.0)
                return
            except AssertionError:
                if not left:
                    raise

    def hang_up(self) -> None:
        """Closes the window."""
        with contextlib.suppress(OSError):
            asyncio.get_running_loop().remove_reader(self.master)
            os.close(self.master)


@asynccontextmanager
async def terminal(
    *command: str, env: dict[str, str], rows: int = 24, columns: int = 80
) -> AsyncIterator[Terminal]:
    """Runs a command in a terminal of its own, as the foreground process."""
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *command, env=env, preexec_fn=lambda: os.login_tty(slave), stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    running = Terminal(master, process)
    asyncio.get_running_loop().add_reader(master, running.readable)
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        running.hang_up()
