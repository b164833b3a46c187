"""Images on this node: fetched by policy, each once however many kernels wait for it.

A fetch belongs to all who wait for it: it is broken off when the last of them leaves (a kernel that is
removed), and when the registry says nothing for a time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import platform
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import docker
import docker.auth
import docker.utils
from docker.errors import DockerException

from dure.agent.backends.base import StartFailed, Tell
from dure.agent.backends.docker import streams
from dure.agent.backends.docker.engine import Engine, EngineError, NotThere, Refusal
from dure.agent.backends.docker.request import Image
from dure.fleet.v1 import fleet_pb2

SILENCE_S = 300.0
TELL_S = 0.5
LAYERS_MAX = 256
REASON = "IMAGE_FAILED"
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
_ALWAYS, _NEVER = fleet_pb2.IMAGE_PULL_POLICY_ALWAYS, fleet_pb2.IMAGE_PULL_POLICY_NEVER
_NOT_ALLOWED = ("unauthorized", "denied", "authentication required", "no basic auth credentials")
_log = logging.getLogger(__name__)


@dataclass
class _Progress:
    """How far a fetch is; `changes` counts what was heard of it."""

    layers: OrderedDict[str, fleet_pb2.ImageLayer] = field(default_factory=OrderedDict)
    changes: int = 0


@dataclass(eq=False)
class _Pull:
    """A fetch that goes on."""

    task: asyncio.Task[None]
    progress: _Progress
    waiting: int = 0


class Images:
    """Lives on one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pulls: dict[str, _Pull] = {}

    async def provide(
        self,
        reference: str,
        policy: fleet_pb2.ImagePullPolicy.ValueType,
        credential: Callable[[], Awaitable[tuple[str, str]]],
        tell: Tell,
    ) -> Image:
        """The image, on this node and for its architecture. Raises StartFailed, or EngineError."""
        if not reference:
            raise StartFailed(
                "this node runs images, and the endpoint has none: give it one with --image", REASON
            )
        if policy != _ALWAYS:
            found = await self._find(reference)
            if found is not None:
                return found
            if policy == _NEVER:
                raise StartFailed(
                    f"image `{reference}` is not on this node, and its pull policy is `never`: load it "
                    "there, or use --pull-policy if-not-present",
                    REASON,
                )
        await self._fetch(reference, credential, tell)
        found = await self._find(reference)
        if found is None:
            raise StartFailed(f"image `{reference}` was fetched and is not there any more", REASON)
        return found

    async def close(self) -> None:
        """Breaks off all fetches."""
        tasks = [pull.task for pull in self._pulls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _find(self, reference: str) -> Image | None:
        """None if the node does not have it. Raises StartFailed for one that cannot run here."""
        try:
            found: dict[str, Any] = await self._engine.call(lambda client: client.inspect_image(reference))
        except NotThere:
            return None
        except Refusal as error:
            raise StartFailed(f"`{reference}` names no image: {error}", REASON) from error
        architecture = _ARCHITECTURES.get(found.get("Architecture", ""), found.get("Architecture", ""))
        here = platform.machine()
        if architecture and architecture != here:
            raise StartFailed(
                f"image `{reference}` is made for {architecture}, this node is {here}: use an image for "
                f"{here}, or ask for nodes of its kind with --architecture {architecture}",
                REASON,
            )
        config = found.get("Config") or {}
        return Image(
            id=found["Id"],
            architecture=architecture,
            user=config.get("User") or "",
            entrypoint=tuple(config.get("Entrypoint") or ()),
            command=tuple(config.get("Cmd") or ()),
        )

    async def _fetch(
        self, reference: str, credential: Callable[[], Awaitable[tuple[str, str]]], tell: Tell
    ) -> None:
        pull = self._pulls.get(reference)
        if pull is None:
            tell(f"fetching image {reference}", fleet_pb2.ImagePull(image=reference))
            user = await credential()
            # Another kernel may have begun while this one asked.
            pull = self._pulls.get(reference) or self._begin(reference, *user)
        pull.waiting += 1
        try:
            await self._wait(reference, pull, tell)
        finally:
            pull.waiting -= 1
            if not pull.waiting and not pull.task.done():
                # Whoever comes from now on begins anew.
                self._forget(reference, pull)
                pull.task.cancel()
                await asyncio.wait([pull.task])

    def _begin(self, reference: str, username: str, password: str) -> _Pull:
        progress = _Progress()
        task = asyncio.create_task(
            self._pull(reference, username, password, progress), name=f"pull {reference}"
        )
        pull = self._pulls[reference] = _Pull(task, progress)

        def over(_: asyncio.Task[None]) -> None:
            self._forget(reference, pull)
            if not task.cancelled():
                task.exception()

        task.add_done_callback(over)
        return pull

    def _forget(self, reference: str, pull: _Pull) -> None:
        if self._pulls.get(reference) is pull:
            del self._pulls[reference]

    async def _wait(self, reference: str, pull: _Pull, tell: Tell) -> None:
        told = 0
        while not pull.task.done():
            await asyncio.wait([pull.task], timeout=TELL_S)
            if pull.progress.changes != told:
                told = pull.progress.changes
                layers = list(pull.progress.layers.values())[:LAYERS_MAX]
                tell(f"fetching image {reference}", fleet_pb2.ImagePull(image=reference, layers=layers))
        if pull.task.cancelled():
            raise StartFailed(f"fetching image `{reference}` was broken off", REASON)
        error = pull.task.exception()
        if isinstance(error, EngineError):
            raise StartFailed(f"cannot fetch image `{reference}`: {explained(str(error))}", REASON)
        if error is not None:
            raise error

    async def _pull(self, reference: str, username: str, password: str, progress: _Progress) -> None:
        """Raises EngineError."""
        name, tag = docker.utils.parse_repository_tag(reference)
        try:
            registry, _ = docker.auth.resolve_repository_name(name)
        except DockerException as error:
            raise Refusal(f"it names no image: {error}", 0) from error
        auth = auth_header(registry, username, password)
        async with streams.pull(self._engine.socket, name, tag or "latest", auth, SILENCE_S) as messages:
            async for message in messages:
                if message.get("error"):
                    raise Refusal(str(message["error"]), 0)
                _note(progress, message)


def _note(progress: _Progress, message: dict[str, Any]) -> None:
    layer_id, status = str(message.get("id") or ""), str(message.get("status") or "")
    # The first message has the tag for its id.
    if not layer_id or not status or status.startswith("Pulling from"):
        return
    detail = message.get("progressDetail") or {}
    before = progress.layers.get(layer_id, fleet_pb2.ImageLayer())
    # Engines tell the size of a layer while it is downloaded, and then no more; some count seconds later on.
    total = int(detail.get("total") or 0) or before.total_bytes
    current = 0 if "units" in detail else int(detail.get("current") or 0)
    progress.changes += 1
    progress.layers[layer_id] = fleet_pb2.ImageLayer(
        id=layer_id[:64], status=status[:64], current_bytes=current, total_bytes=total
    )


def auth_header(registry: str, username: str, password: str) -> str:
    """Of the manager's credential, else of `docker login` for the agent's user; empty if there is none."""
    auth: dict[str, Any]
    if username or password:
        auth = {"username": username, "password": password, "serveraddress": registry}
    else:
        try:
            found = docker.auth.resolve_authconfig(docker.auth.load_config(), registry)
        except (DockerException, OSError, ValueError) as error:
            _log.warning("the credentials of `docker login` cannot be read: %s", error)
            found = None
        if not found:
            return ""
        auth = {str(key).lower(): value for key, value in found.items()}
    return base64.urlsafe_b64encode(json.dumps(auth).encode()).decode("ascii")


def explained(words: str) -> str:
    """The engine's words, and what to do about those that come often."""
    lower = words.lower()
    if any(sign in lower for sign in _NOT_ALLOWED):
        return f"{words}; is it spelled right? If it is private: `dure registry set HOST --username USER`"
    if "not found" in lower or "manifest unknown" in lower:
        return f"{words}; is it spelled right, and is there such a tag?"
    if "no such host" in lower or "connection refused" in lower or "timeout" in lower:
        return f"{words}; can this node reach the registry?"
    return words
