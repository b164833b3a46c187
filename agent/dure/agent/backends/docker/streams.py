"""What an engine sends bit by bit: events, logs, progress of pulls, output of commands.

Streams are read by the event loop, each on a connection of its own, so that following a hundred logs takes
no threads, and letting go of one closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp

from dure.agent.backends.docker.engine import NoAnswer, NotThere, Refusal

CONNECT_S = 10.0
FRAME_BYTES_MAX = 1024 * 1024
LINE_BYTES_MAX = 1024 * 1024
_HEADER_BYTES = 8


@contextlib.asynccontextmanager
async def opened(
    socket: str,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    silence_s: float | None = None,
) -> AsyncIterator[aiohttp.StreamReader]:
    """The body of an answer, as it comes; `silence_s` bounds the wait for its next piece. Raises
    EngineError."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence_s)
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(socket), timeout=timeout, read_bufsize=LINE_BYTES_MAX
            ) as session,
            session.request(
                method, f"http://engine{path}", params=query, json=body, headers=headers
            ) as response,
        ):
            if response.status >= 400:
                said = await response.content.read(LINE_BYTES_MAX)
                kind = NotThere if response.status == 404 else Refusal
                raise kind(_message(said), response.status)
            yield response.content
    except (aiohttp.ClientError, TimeoutError) as error:
        raise NoAnswer(f"the container engine broke off: {str(error) or type(error).__name__}") from error


async def frames(content: aiohttp.StreamReader) -> AsyncIterator[tuple[int, bytes]]:
    """Pieces of output without a terminal: 1 for stdout, 2 for stderr, and the bytes."""
    while True:
        try:
            header = await content.readexactly(_HEADER_BYTES)
            size = int.from_bytes(header[4:], "big")
            if size > FRAME_BYTES_MAX:
                raise NoAnswer("the container engine sent what is no output of a container")
            yield header[0], await content.readexactly(size)
        except asyncio.IncompleteReadError:
            return


async def messages(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """JSON objects, one after the other. Raises NoAnswer for what is none."""
    rest = b""
    async for data in content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            raise NoAnswer("the container engine sent a message without an end")
        for line in lines:
            if line.strip():
                yield _object(line)
    if rest.strip():
        yield _object(rest)


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        # The middle of a message, from an engine that is going down.
        raise NoAnswer(f"the container engine sent what is no message: {line[:80]!r}")
    return found


@contextlib.asynccontextmanager
async def events(
    socket: str, labels: Sequence[str], since: str
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Starts and ends of containers with the labels (`name=value`), from a time on that is given in Unix
    seconds with a fraction."""
    # Podman's words too, where they are others: `died`, `remove`.
    words = ["start", "die", "died", "oom", "kill", "destroy", "remove", "pause", "unpause"]
    filters = {"type": ["container"], "label": list(labels), "event": words}
    query = {"filters": json.dumps(filters), "since": since}
    async with opened(socket, "GET", "/events", query=query) as content:
        yield messages(content)


@contextlib.asynccontextmanager
async def log(
    socket: str, container: str, since: str, *, follow: bool
) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
    """What a container wrote and, to follow, writes until it ends, each line after its time. `since` is a
    time in Unix seconds with a fraction, empty for all."""
    query = {"stdout": "1", "stderr": "1", "timestamps": "1", "follow": "1" if follow else "0"}
    if since:
        query["since"] = since
    async with opened(socket, "GET", f"/containers/{container}/logs", query=query) as content:
        yield frames(content)


@contextlib.asynccontextmanager
async def pull(
    socket: str, name: str, tag: str, auth: str, silence_s: float
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Progress of fetching an image; letting go of it ends the fetching."""
    headers = {"X-Registry-Auth": auth} if auth else {}
    query = {"fromImage": name, "tag": tag}
    async with opened(
        socket, "POST", "/images/create", query=query, headers=headers, silence_s=silence_s
    ) as content:
        yield messages(content)


@contextlib.asynccontextmanager
async def command(
    socket: str, container: str, arguments: Sequence[str], environ: Mapping[str, str], folder: str
) -> AsyncIterator[tuple[str, AsyncIterator[tuple[int, bytes]]]]:
    """Runs a command in a container: its id, and its output until it ends."""
    body = {
        "AttachStdout": True,
        "AttachStderr": True,
        "Cmd": list(arguments),
        "Env": [f"{name}={value}" for name, value in environ.items()],
        "WorkingDir": folder,
    }
    path = f"/containers/{container}/exec"
    async with opened(socket, "POST", path, body=body, silence_s=CONNECT_S) as content:
        made = json.loads(await content.read(LINE_BYTES_MAX))["Id"]
    async with opened(socket, "POST", f"/exec/{made}/start", body={"Detach": False, "Tty": False}) as content:
        yield made, frames(content)


def _message(said: bytes) -> str:
    try:
        return str(json.loads(said)["message"]).strip()
    except (ValueError, KeyError, TypeError):
        return said.decode(errors="replace").strip()[:1000] or "no reason given"
