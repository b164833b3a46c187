"""Pre-start actions. They run inside the session, in order, before the command."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from dure.agent.shim.templates import fill

# Of each stream of a `run_command`; what comes after is read and dropped.
OUTPUT_BYTES_MAX = 64 * 1024
MESSAGE_CHARACTERS_MAX = 2000


class ActionFailed(Exception):
    """The sentence says what went wrong, not which action it was."""


class Runner:
    """Keeps the results of the actions that ran. `model` is the model folder as the session sees it."""

    def __init__(
        self, values: dict[str, str], home: str, model: str, env: dict[str, str], limit_s: float
    ) -> None:
        self.values = dict(values)
        self._home = home
        self._model = model
        self._env = env
        self._limit_s = limit_s

    def run(self, action: dict[str, Any]) -> None:
        """Raises ActionFailed."""
        try:
            result = getattr(self, f"_{action['kind']}")(action)
        except OSError as error:
            raise ActionFailed(self._explain(error)) from error
        if action["ref"]:
            for suffix, value in result.items():
                self.values[action["ref"] + suffix] = value

    def _write_file(self, action: dict[str, Any]) -> dict[str, str]:
        path = self._writable(fill(action["filename"], self.values))
        with open(path, "a" if action["append"] else "w", encoding="utf-8") as file:
            file.write(fill(action["body"], self.values))
        os.chmod(path, action["mode"] or 0o644)
        return {"": path}

    def _write_tempfile(self, action: dict[str, Any]) -> dict[str, str]:
        descriptor, path = tempfile.mkstemp(dir=self._home, suffix=action["suffix"])
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(fill(action["body"], self.values))
        os.chmod(path, action["mode"] or 0o644)
        return {"": path}

    def _mkdir(self, action: dict[str, Any]) -> dict[str, str]:
        path = self._writable(fill(action["path"], self.values))
        if action["parents"]:
            os.makedirs(path, exist_ok=True)
        elif not os.path.isdir(path):
            os.mkdir(path)
        return {"": path}

    def _log(self, action: dict[str, Any]) -> dict[str, str]:
        prefix = "[debug] " if action["debug"] else ""
        _say(f"{prefix}{fill(action['message'], self.values)}\n".encode())
        return {}

    def _run_command(self, action: dict[str, Any]) -> dict[str, str]:
        arguments = [fill(argument, self.values) for argument in action["command"]]
        if not arguments:
            raise ActionFailed("the command is empty")
        code, out, err = _run(arguments, self._env, action["echo"], self._limit_s)
        if code is None:
            raise ActionFailed(f"`{arguments[0]}` ran longer than {self._limit_s:g} s{_tail(out, err)}")
        if code != 0 and action["check"]:
            ended = f"exited with code {code}" if code > 0 else f"was ended by {_signal_name(-code)}"
            raise ActionFailed(f"`{arguments[0]}` {ended}{_tail(out, err)}")
        text, error_text = (stream.decode(errors="replace").rstrip("\n") for stream in (out, err))
        return {"": text, ".out": text, ".err": error_text}

    def _writable(self, path: str) -> str:
        # Without a mount namespace nothing but this keeps the shared model folder as it was uploaded.
        whole = os.path.realpath(os.path.join(self._model, path))
        model = os.path.realpath(self._model)
        if (
            os.path.commonpath([whole, model]) == model
            and os.path.commonpath([whole, self._home]) != self._home
        ):
            raise ActionFailed(self._read_only(path))
        return os.path.join(self._model, path)

    def _explain(self, error: OSError) -> str:
        if error.errno == 30:  # EROFS
            return self._read_only(str(error.filename))
        name = f"`{error.filename}`: " if error.filename else ""
        return f"{name}{error.strerror or error}"

    def _read_only(self, path: str) -> str:
        return f"`{path}` is in the model folder, which is read-only; write below {self._home} instead"


def _run(
    arguments: list[str], env: dict[str, str], echo: bool, limit_s: float
) -> tuple[int | None, bytes, bytes]:
    """Exit code (None: it took too long and was killed), output and errors."""
    process = subprocess.Popen(
        arguments,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    streams = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    out, err = streams.values()
    poll = select.poll()
    for descriptor in streams:
        os.set_blocking(descriptor, False)
        poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + limit_s
    code: int | None = None
    left = len(streams)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll(0 if code is not None else 50 if left else 10)]
        for descriptor in ready:
            data = os.read(descriptor, 65536)
            if not data:
                poll.unregister(descriptor)
                left -= 1
                continue
            streams[descriptor] += data[: OUTPUT_BYTES_MAX - len(streams[descriptor])]
            if echo:
                _say(data)
        # What a background child still writes afterwards is not waited for.
        if code is not None and not ready:
            break
        if code is None:
            code = process.poll()
        if code is None and time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
            break
        if code is not None and time.monotonic() > deadline:
            break
    process.stdout.close()
    process.stderr.close()
    return code, bytes(out), bytes(err)


def _say(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _tail(out: bytes, err: bytes) -> str:
    text = (err.strip() or out.strip()).decode(errors="replace")
    return f": {text[-MESSAGE_CHARACTERS_MAX:]}" if text else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
