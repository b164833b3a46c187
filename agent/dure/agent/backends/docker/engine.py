"""Calls of a container engine: blocking ones of the package `docker`, each in a thread, within bounds.

An engine that hangs holds up whoever asked it, for a limited time, and nobody else: threads that wait for
it are daemons, and there are never more than CALLS_MAX of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

import docker
from docker.errors import APIError, DockerException, NotFound
from requests.exceptions import RequestException

from dure.agent.waiting import in_daemon

CALLS_MAX = 8
QUICK_S = 10.0
# Making and starting containers, which takes the engine seconds when the node is busy.
SLOW_S = 60.0
DEFAULT_URL = "unix:///var/run/docker.sock"
_T = TypeVar("_T")


class EngineError(OSError):
    """The engine did not do what it was asked."""


class NoAnswer(EngineError):
    """It cannot be reached, or does not answer in time: nothing is known."""


class Refusal(EngineError):
    """It said no; the message is its own."""

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code


class NotThere(Refusal):
    """It knows no such thing."""


def url() -> str:
    """Where the engine of this node listens."""
    return os.environ.get("DOCKER_HOST") or DEFAULT_URL


class Engine:
    """One engine. Lives on one event loop."""

    def __init__(self, where: str) -> None:
        self.url = where
        self._slots = asyncio.Semaphore(CALLS_MAX)
        self._clients: dict[float, docker.APIClient] = {}

    @property
    def socket(self) -> str:
        """Path of its socket."""
        return self.url.removeprefix("unix://")

    async def call(
        self, function: Callable[[docker.APIClient], _T], limit_s: float = QUICK_S, whole: bool = False
    ) -> _T:
        """The function's result. With `whole` a caller that is cancelled waits for the end first: what the
        call makes must be there, or not, when the caller cleans up. Raises EngineError."""
        try:
            async with asyncio.timeout(limit_s) as limit:
                await self._slots.acquire()
                answer = in_daemon(lambda: function(self._client(limit_s)), "docker", self._slots.release)
                # Nobody may be left who would ask how it ended.
                answer.add_done_callback(lambda done: done.cancelled() or done.exception())
                try:
                    return await asyncio.shield(answer)
                except asyncio.CancelledError:
                    if whole and not limit.expired():
                        await asyncio.wait([answer], timeout=limit_s)
                    raise
        except TimeoutError:
            raise NoAnswer(f"the container engine did not answer within {limit_s:g} s") from None
        except NotFound as error:
            raise NotThere(_words(error), 404) from error
        except APIError as error:
            raise Refusal(_words(error), error.status_code or 0) from error
        except (RequestException, DockerException) as error:
            raise NoAnswer(f"the container engine at {self.url} does not answer: {_cause(error)}") from error

    def _client(self, limit_s: float) -> docker.APIClient:
        client = self._clients.get(limit_s)
        if client is None:
            # Two threads may both make one; the later stays, and both work.
            client = docker.APIClient(self.url, version="auto", timeout=limit_s, max_pool_size=CALLS_MAX)
            self._clients[limit_s] = client
        return client


def _words(error: APIError) -> str:
    text = error.explanation or str(error)
    return (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).strip()


def _cause(error: BaseException) -> str:
    """The innermost reason: the outer ones only wrap it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(
        error
    ).__name__
