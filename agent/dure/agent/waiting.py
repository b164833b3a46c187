"""Waiting on the event loop: for descriptors, and for threads that must not be left alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def watched(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """A task of which it is told when it breaks, though nobody waits for it."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(_tell_of_crash)
    return task


def _tell_of_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s broke; this is a bug", task.get_name(), exc_info=error)


async def readable(descriptors: Sequence[int], limit_s: float | None = None) -> bool:
    """Waits until one of them can be read (a pidfd: until its process ended); False after `limit_s`."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    # A loop keeps one reader of a descriptor, and who stops a kernel waits beside who follows it.
    own = [os.dup(descriptor) for descriptor in descriptors]
    try:
        for descriptor in own:
            loop.add_reader(descriptor, wake)
        done, _ = await asyncio.wait([ready], timeout=limit_s)
    finally:
        for descriptor in own:
            loop.remove_reader(descriptor)
            os.close(descriptor)
    return bool(done)


async def in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Runs a blocking function to its end even if the caller is cancelled meanwhile.

    What it makes (a lease, a control group) must be there or not be there when the caller cleans up.
    """
    task = asyncio.create_task(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def is_readable(descriptor: int) -> bool:
    """Whether it can be read now."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def in_daemon(function: Callable[[], _T], name: str, back: Callable[[], object]) -> asyncio.Future[_T]:
    """The answer to come of a blocking call that may never come back: in a daemon thread of its own, for
    which neither the loop nor the end of the program waits. `back` is called on the loop when it has come
    back, whether or not anybody still wants the answer."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_T] = loop.create_future()

    def deliver(result: _T | None, error: Exception | None) -> None:
        back()
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, raised = None, None
        try:
            result = function()
        except Exception as error:
            raised = error
        # The loop may be closed when a late call comes back.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, result, raised)

    threading.Thread(target=work, name=name, daemon=True).start()
    return answer


class Background:
    """Runs blocking calls, one at a time: one that never comes back only keeps the next from being tried."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._busy = False

    async def run(self, function: Callable[[], _T], limit_s: float) -> _T:
        """Raises TimeoutError after `limit_s`, or at once if the call before has not come back yet."""
        if self._busy:
            raise TimeoutError("the call before has not come back yet")
        answer = in_daemon(function, self._name, self._back)
        self._busy = True
        async with asyncio.timeout(limit_s):
            return await answer

    def _back(self) -> None:
        self._busy = False
