"""The command `dure` as a program of its own, beside a fake manager."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from link.client.fake_manager import FakeManager, fake_manager, write_context

CREATE = [
    "endpoint",
    "create",
    "chat",
    "--model",
    "m",
    "-r",
    "cpu=1",
    "-r",
    "mem=1g",
    "-r",
    "cuda.shares=0.25",
]


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, object]:
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


class Dure:
    """Runs `dure` as a subprocess with a context of its own."""

    def __init__(self, context: Path, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "DURE_CONTEXT_FILE": str(context),
        }

    async def start(
        self, *arguments: str, stdin: int = asyncio.subprocess.DEVNULL
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dure.client.cli.main", *arguments),
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environ,
            cwd=self.folder,
        )

    async def __call__(self, *arguments: str) -> Ran:
        return await finish(await self.start(*arguments))

    async def fed(self, content: bytes, *arguments: str) -> Ran:
        """With something on its stdin."""
        process = await self.start(*arguments, stdin=asyncio.subprocess.PIPE)
        return await finish(process, content)

    async def ok(self, *arguments: str) -> Ran:
        ran = await self(*arguments)
        assert ran.code == 0, ran
        assert "\x1b" not in ran.out + ran.err
        return ran


async def finish(process: asyncio.subprocess.Process, content: bytes | None = None) -> Ran:
    out, err = await process.communicate(content)
    assert process.returncode is not None
    text = err.decode()
    assert "Traceback" not in text, text
    return Ran(process.returncode, out.decode(), text)


Body = Callable[[FakeManager, Dure], Awaitable[None]]


def with_cli(tmp_path: Path, body: Body) -> None:
    async def run() -> None:
        async with asyncio.timeout(40), fake_manager() as fake:
            await body(fake, Dure(write_context(fake, tmp_path), tmp_path))

    asyncio.run(run())
