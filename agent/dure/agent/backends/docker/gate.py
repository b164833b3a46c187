"""Pre-start actions in a container: its first program waits at a gate while they run beside it, then it
becomes the command. They need `/bin/sh` in the image.

The gate is a folder of the node that the container sees read-only: a FIFO at which it waits, the contents of
files that actions write, and at the end the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dure.agent.backends.base import HOME, Plan, StartFailed, Tell
from dure.agent.backends.docker import streams
from dure.agent.backends.docker.engine import Engine, EngineError
from dure.agent.backends.docker.logs import LogCopy
from dure.agent.backends.docker.request import GATE
from dure.agent.shim.actions import MESSAGE_CHARACTERS_MAX, OUTPUT_BYTES_MAX
from dure.agent.shim.templates import fill

ACTION_LIMIT_S = 600.0
OPEN_LIMIT_S = 15.0
# A stop during the actions ends the shell that waits: it is nobody's first process, and has no handlers.
WAITING = ("/bin/sh", "-c", f"read -r _ < {GATE}/gate && . {GATE}/start")
_WRITE = 'cat "$1" {redirect} "$2" && chmod "$3" "$2"'
_STDERR = 2
# What init leaves with if it cannot run the shell.
_NOT_RUN = (126, 127)


class ActionFailed(Exception):
    """The sentence says what went wrong, not which action it was."""


def make(folder: Path) -> None:
    """The gate in a kernel's folder, closed."""
    gate = folder / "gate"
    gate.mkdir(exist_ok=True)
    # The image's user reads it; above it, only the agent's user may enter.
    gate.chmod(0o755)
    with contextlib.suppress(FileExistsError):
        os.mkfifo(gate / "gate")
    (gate / "gate").chmod(0o644)


def waits(pids: Sequence[int] | frozenset[int]) -> bool:
    """Whether one of the processes still waits at the gate."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if f"{GATE}/gate".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False


class Gate:
    """Of one container that waits."""

    def __init__(
        self, engine: Engine, container: str, plan: Plan, environ: Mapping[str, str], log: LogCopy
    ) -> None:
        self._engine = engine
        self._container = container
        self._plan = plan
        self._environ = environ
        self._log = log
        self._folder = plan.handle.folder / "gate"
        self._values = {"model_path": plan.model_path, "port": str(plan.port)}

    async def pass_through(self, command: Sequence[str], tell: Tell) -> None:
        """Runs the actions, and lets the container become the command. Raises StartFailed, or EngineError."""
        run = {
            "write_file": self._write_file,
            "write_tempfile": self._write_tempfile,
            "run_command": self._run_command,
            "mkdir": self._mkdir,
            "log": self._say,
        }
        for index, action in enumerate(self._plan.actions):
            name = action["kind"]
            tell(f"pre-start action {index} ({name})", None)
            try:
                async with asyncio.timeout(ACTION_LIMIT_S):
                    result = await run[name](action)
            except TimeoutError as error:
                raise self._failed(index, name, f"it ran longer than {ACTION_LIMIT_S:g} s") from error
            except ActionFailed as error:
                await self._still_waits()
                raise self._failed(index, name, str(error)) from error
            if action["ref"]:
                self._values |= {action["ref"] + suffix: value for suffix, value in result.items()}
        await self._open(command)

    def _failed(self, index: int, name: str, message: str) -> StartFailed:
        sentence = f"pre-start action {index} ({name}) failed: {message}"
        self._log.write(f"{sentence}\n".encode())
        return StartFailed(sentence, "ACTION_FAILED")

    async def _still_waits(self) -> None:
        """Raises StartFailed if the container has ended, for whatever was to be done in it cannot be done
        then."""
        state = (await self._engine.call(lambda client: client.inspect_container(self._container)))["State"]
        if state["Running"]:
            return
        code = int(state["ExitCode"])
        if code in _NOT_RUN:
            raise StartFailed("pre-start actions need /bin/sh in the image, which cannot be run there")
        raise StartFailed(f"its container ended with code {code} before the pre-start actions did")

    async def _open(self, command: Sequence[str]) -> None:
        words = shlex.join(fill(word, self._values) for word in command)
        start = self._folder / "start"
        start.write_text(f"exec {words}\n", encoding="utf-8")
        start.chmod(0o644)
        deadline_s = asyncio.get_running_loop().time() + OPEN_LIMIT_S
        while True:
            try:
                descriptor = os.open(self._folder / "gate", os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                # Nobody reads yet: the shell is being started.
                if asyncio.get_running_loop().time() > deadline_s:
                    raise StartFailed("its container did not wait for the pre-start actions") from error
                await self._still_waits()
                await asyncio.sleep(0.05)
                continue
            try:
                os.write(descriptor, b"go\n")
            finally:
                os.close(descriptor)
            return

    async def _write_file(self, action: dict[str, Any]) -> dict[str, str]:
        path = self._place(action["filename"])
        await self._write(path, action, append=action["append"])
        return {"": path}

    async def _write_tempfile(self, action: dict[str, Any]) -> dict[str, str]:
        path = f"{HOME}/tmp{secrets.token_hex(6)}{action['suffix']}"
        await self._write(path, action, append=False)
        return {"": path}

    async def _write(self, path: str, action: dict[str, Any], *, append: bool) -> None:
        body = self._folder / "body"
        await asyncio.to_thread(body.write_text, fill(action["body"], self._values), "utf-8")
        body.chmod(0o644)
        script = _WRITE.format(redirect=">>" if append else ">")
        mode = f"{action['mode'] or 0o644:o}"
        await self._shell(script, f"{GATE}/body", path, mode)

    async def _mkdir(self, action: dict[str, Any]) -> dict[str, str]:
        path = self._place(action["path"])
        await self._shell(f'[ -d "$1" ] || mkdir {"-p " if action["parents"] else ""}"$1"', path)
        return {"": path}

    async def _say(self, action: dict[str, Any]) -> dict[str, str]:
        prefix = "[debug] " if action["debug"] else ""
        self._log.write(f"{prefix}{fill(action['message'], self._values)}\n".encode())
        return {}

    async def _run_command(self, action: dict[str, Any]) -> dict[str, str]:
        arguments = [fill(argument, self._values) for argument in action["command"]]
        if not arguments:
            raise ActionFailed("the command is empty")
        code, out, err = await self._run(arguments, echo=action["echo"])
        if code != 0 and action["check"]:
            raise ActionFailed(f"`{arguments[0]}` exited with code {code}{_tail(out, err)}")
        text, error_text = (stream.decode(errors="replace").rstrip("\n") for stream in (out, err))
        return {"": text, ".out": text, ".err": error_text}

    def _place(self, path: str) -> str:
        return os.path.join(self._plan.model_target, fill(path, self._values))

    async def _shell(self, script: str, *arguments: str) -> None:
        code, out, err = await self._run(["/bin/sh", "-c", script, "sh", *arguments], echo=False)
        if code != 0:
            said = (err or out).decode(errors="replace").strip()
            if "Read-only file system" in said:
                said = f"{said}; the model folder is read-only: write below {HOME} instead"
            raise ActionFailed(said[-MESSAGE_CHARACTERS_MAX:] or f"exited with code {code}")

    async def _run(self, arguments: Sequence[str], *, echo: bool) -> tuple[int, bytes, bytes]:
        output = {1: bytearray(), _STDERR: bytearray()}
        try:
            async with streams.command(
                self._engine.socket, self._container, arguments, self._environ, self._plan.model_target
            ) as (exec_id, frames):
                async for stream, data in frames:
                    kept = output[_STDERR if stream == _STDERR else 1]
                    kept += data[: OUTPUT_BYTES_MAX - len(kept)]
                    if echo:
                        self._log.write(data)
            inspected: dict[str, Any] = await self._engine.call(lambda client: client.exec_inspect(exec_id))
        except EngineError as error:
            raise ActionFailed(f"the container engine could not run `{arguments[0]}`: {error}") from error
        return int(inspected.get("ExitCode") or 0), bytes(output[1]), bytes(output[_STDERR])


def _tail(out: bytes, err: bytes) -> str:
    text = (err.strip() or out.strip()).decode(errors="replace")
    return f": {text[-MESSAGE_CHARACTERS_MAX:]}" if text else ""
