"""Runs checks against one agent, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from dure.agent.conformance.check import Check, batches
from dure.agent.conformance.manager import JOIN_TOKEN, STORAGE_ID, Manager
from dure.agent.conformance.outcome import Failed, NotApplicable, Outcome, Result
from dure.agent.conformance.program import Program
from dure.agent.conformance.stage import Stage, Subject
from dure.fleet.v1 import fleet_pb2

AT_ONCE = 4
_NAME = "conformance"


class NeedsImage(Exception):
    """The agent runs images, and none was given."""


@dataclass(frozen=True)
class Wanted:
    """What to run. `arguments` start the agent; `stop_signal` ends it at last."""

    arguments: Sequence[str]
    stop_signal: signal.Signals
    image: str
    limit_s: float


async def run(
    wanted: Wanted, checks: Sequence[Check], tell: Callable[[Result], None]
) -> tuple[fleet_pb2.Hello | None, list[Result]]:
    """Tells each result as it comes; returns the agent's Hello, and all results in the order of the checks.
    Raises NeedsImage, or OSError if there is no such program."""
    async with _subject(wanted) as subject:
        results: dict[str, Result] = {}

        async def one(check: Check) -> None:
            results[check.name] = await _run_check(subject, check, wanted.limit_s)
            tell(results[check.name])

        problem = await _first_hello(subject, wanted.limit_s)
        hello = subject.manager.hello
        if hello is not None and hello.runs_images and not wanted.image:
            raise NeedsImage
        for batch in batches(checks, AT_ONCE):
            if hello is None:
                for check in batch:
                    results[check.name] = Result(
                        check.name, check.rule, Outcome.FAILED, 0.0, problem.expected, problem.seen
                    )
                    tell(results[check.name])
                continue
            if not subject.program.runs:
                # The check before may have brought it down: that is told there.
                await subject.program.start()
            await asyncio.gather(*(one(check) for check in batch))
        return hello, [results[check.name] for check in checks]


@contextlib.asynccontextmanager
async def _subject(wanted: Wanted) -> AsyncIterator[Subject]:
    """A stand-in manager and the agent's program; nothing of both is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dure-conformance-"))
    manager: Manager | None = None
    program: Program | None = None
    try:
        # Who runs in a kernel without being root must be able to read the folders.
        folder.chmod(0o755)
        storage, data_dir = folder / "storage", folder / "data"
        storage.mkdir()
        data_dir.mkdir(mode=0o700)
        (storage / ".storage-id").write_text(STORAGE_ID, encoding="ascii")
        manager = Manager(storage)
        await manager.start()
        values = {
            "manager": f"127.0.0.1:{manager.port}",
            "join_token": JOIN_TOKEN,
            "name": _NAME,
            "data_dir": str(data_dir),
        }
        program = Program(wanted.arguments, values, folder / "program.log")
        await program.start()
        async with aiohttp.ClientSession() as http:
            yield Subject(manager, program, http, _NAME, wanted.image)
    finally:
        if program is not None:
            await program.stop(wanted.stop_signal)
        if manager is not None:
            await manager.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def _first_hello(subject: Subject, limit_s: float) -> Failed:
    """What is wrong if the agent does not say Hello."""
    stage = Stage(subject)
    expected = "a stream with Hello after the program's start"
    try:
        async with asyncio.timeout(limit_s):
            await stage.until(
                lambda: subject.manager.hello is not None,
                expected,
                lambda: (
                    f"no Hello within {limit_s:g} s ({subject.program.said() or 'the program says nothing'})"
                ),
            )
    except Failed as failed:
        return failed
    except TimeoutError:
        return stage.awaited
    return Failed(expected, "nothing")


async def _run_check(subject: Subject, check: Check, limit_s: float) -> Result:
    stage = Stage(subject)
    began_s = time.monotonic()

    def result(outcome: Outcome, failed: Failed | None = None, reason: str = "") -> Result:
        took_s = time.monotonic() - began_s
        expected, seen = (failed.expected, failed.seen) if failed is not None else ("", "")
        return Result(check.name, check.rule, outcome, took_s, expected, seen, reason)

    found: Result
    try:
        async with asyncio.timeout(limit_s):
            await stage.connected()
            await check.run(stage)
        found = result(Outcome.PASSED)
    except Failed as failed:
        found = result(Outcome.FAILED, failed)
    except NotApplicable as why:
        found = result(Outcome.NOT_APPLICABLE, reason=str(why))
    except TimeoutError:
        awaited = stage.awaited
        seen = f"after {limit_s:g} s: {awaited.seen}"
        found = result(Outcome.FAILED, Failed(awaited.expected, seen))
    except Exception as error:
        # The top of a check: what no check could foresee is the agent's answer too.
        expected = f"answers that the check can read (rule {check.rule}: {' '.join(check.says.split())})"
        found = result(Outcome.FAILED, Failed(expected, f"{type(error).__name__}: {error}"))
    try:
        await stage.clean()
    except Failed as failed:
        if found.outcome is not Outcome.FAILED:
            found = result(Outcome.FAILED, failed)
    return found
