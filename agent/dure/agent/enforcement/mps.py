"""MPS: NVIDIA's server computes for several programs on one GPU, and gives each a part of the processors and
a bound of memory.

There is one control daemon per GPU, started when a kernel first needs it and started again when it dies, not
more often than a bound. So a kernel has one GPU; and all kernels on one GPU run as one Unix user, since
a server serves one. Both are refused with the reason, or, where only a container's image tells the user,
said as soon as it shows.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

from dure.agent.backends.base import Bind, Ended, Injection, StartFailed
from dure.agent.enforcement import CannotHold, Held, Seen, mebibytes, percent
from dure.agent.enforcement.choice import REASON
from dure.agent.enforcement.mps_daemon import Daemon, DaemonFailed, folders
from dure.fleet.v1 import fleet_pb2
from dure.wire.enforcement import MPS

# Where a container has the pipes.
TARGET = "/run/nvidia-mps"
DEATHS_MAX, DEATHS_WITHIN_S = 5, 600.0
MOMENT_S = 2.0
_log = logging.getLogger(__name__)


def may_start(deaths_s: Sequence[float], now_s: float) -> bool:
    """Whether a daemon that died at these times may be started again."""
    return sum(now_s - death_s < DEATHS_WITHIN_S for death_s in deaths_s) < DEATHS_MAX


class Mps:
    """See `enforcement.Enforcer`. Daemons live in `home`."""

    name = MPS
    by_use = True

    def __init__(self, home: Path) -> None:
        self._home = home
        self._daemons: dict[str, Daemon] = {}
        self._deaths_s: dict[str, list[float]] = {}
        self._reason: dict[str, str] = {}
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        # Unix users of the kernels on each GPU, as seen last.
        self._users: dict[str, dict[str, int]] = {}

    @property
    def limitations(self) -> tuple[str, ...]:
        """Sentences for people."""
        return tuple(
            f"GPU {gpu}: programs that go around MPS are not kept out: {daemon.not_exclusive}"
            for gpu, daemon in sorted(self._daemons.items())
            if daemon.not_exclusive
        )

    async def probe(self, device: fleet_pb2.Device, told: bool) -> str:
        if device.accelerator != "cuda" or device.parent:
            return "MPS is for whole NVIDIA GPUs"
        if not told:
            return "the driver does not tell which processes use it, so that nothing could be verified"
        daemon = self._daemon(device.id)
        problem = daemon.impossible()
        if problem:
            return problem
        # Nobody needs one that was never started; one that was is kept up.
        if not daemon.was_started():
            return ""
        if daemon.pid():
            return ""
        return await self._in_background(daemon.gpu, lambda: self._keep_up(daemon))

    async def inject(self, kernel: Held) -> Injection:
        if len(kernel.parts) != 1:
            raise StartFailed(
                "the GPUs of this node are shared through MPS, one daemon for each, and a session that has "
                f"{len(kernel.parts)} of them could use one only; ask for one GPU, or have the node's "
                "operator choose another --gpu-enforcement",
                REASON,
            )
        (part,) = kernel.parts
        memory_mib = mebibytes(part)
        others = {user for uid, user in dict(self._users.get(part.device, {})).items() if uid != kernel.uid}
        if kernel.user is not None and others and kernel.user not in others:
            raise StartFailed(_one_user(kernel.user, min(others), part.device), REASON)
        daemon = self._daemon(part.device)
        try:
            await self._keep_up(daemon)
        except DaemonFailed as error:
            raise CannotHold(str(error)) from error
        pipes = os.path.realpath(daemon.pipes)
        return Injection(
            {
                "CUDA_MPS_PIPE_DIRECTORY": TARGET if kernel.contained else pipes,
                "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent(part)),
                # The daemon has one GPU, which is its number 0.
                "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={memory_mib}M",
            },
            (Bind(pipes, TARGET, False),) if kernel.contained else (),
            host_ipc=kernel.contained,
        )

    def verify(self, kernel: Held, seen: Seen) -> str:
        user = _user(seen.pids)
        for part in kernel.parts:
            on_it = self._users.setdefault(part.device, {})
            others = {one for uid, one in on_it.items() if uid != kernel.uid}
            if user is not None:
                on_it[kernel.uid] = user
            if user is not None and others and user not in others and not seen.using:
                return _one_user(user, min(others), part.device)
        around = sorted(seen.using - seen.sharing)
        return f"process {around[0]} uses the GPU around MPS" if around else ""

    def watch(self, kernel: Held, seen: Seen) -> Ended | None:
        return None

    def forget(self, living: frozenset[str]) -> None:
        self._users = {
            gpu: {uid: user for uid, user in users.items() if uid in living}
            for gpu, users in self._users.items()
        }

    async def retire(self, still_used: Collection[str]) -> None:
        """Ends the daemons of all GPUs but these."""
        for folder in await asyncio.to_thread(folders, self._home):
            daemon = Daemon.at(folder)
            if daemon is not None and daemon.gpu not in still_used:
                await self._in_background(daemon.gpu, functools.partial(self._retire, daemon))

    async def close(self) -> None:
        """Ends the daemons of all GPUs, however long that takes; each has its limits."""
        await self.detach()
        for folder in await asyncio.to_thread(folders, self._home):
            daemon = Daemon.at(folder)
            if daemon is not None:
                await self._retire(daemon)

    async def detach(self) -> None:
        """Breaks off what is under way; the next agent goes on with it."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._under_way.clear()

    async def _retire(self, daemon: Daemon) -> None:
        async with self._lock(daemon.gpu):
            await daemon.end()
        self._daemons.pop(daemon.gpu, None)
        _log.info("the MPS control daemon of %s was ended: nothing needs it", daemon.gpu)

    async def _in_background(self, gpu: str, work: Callable[[], Coroutine[Any, Any, None]]) -> str:
        """Begins it, unless something is under way for the GPU, and waits a moment for its end: a daemon that
        hangs must not hold up who looks at other GPUs. Empty, or a sentence."""
        if gpu not in self._under_way:
            self._under_way[gpu] = asyncio.create_task(work(), name=f"MPS of {gpu}")
        task = self._under_way[gpu]
        done, _ = await asyncio.wait({task}, timeout=MOMENT_S)
        if not done:
            return "its control daemon takes long to start or to end"
        del self._under_way[gpu]
        try:
            task.result()
        except (DaemonFailed, OSError) as error:
            return str(error)
        return ""

    def _daemon(self, gpu: str) -> Daemon:
        if gpu not in self._daemons:
            self._daemons[gpu] = Daemon.of(self._home, gpu)
        return self._daemons[gpu]

    def _lock(self, gpu: str) -> asyncio.Lock:
        return self._locks.setdefault(gpu, asyncio.Lock())

    async def _keep_up(self, daemon: Daemon) -> None:
        """Sees to it that it runs. Raises DaemonFailed if it does not and may not be started."""
        async with self._lock(daemon.gpu):
            if daemon.pid():
                return
            now_s, deaths_s = time.monotonic(), self._deaths_s.setdefault(daemon.gpu, [])
            if daemon.was_started():
                if not may_start(deaths_s, now_s):
                    raise DaemonFailed(self._reason[daemon.gpu])
                deaths_s.append(now_s)
                del deaths_s[:-DEATHS_MAX]
                _log.warning("the MPS control daemon of %s is gone; starting it again", daemon.gpu)
            try:
                await daemon.start()
            except (DaemonFailed, OSError) as error:
                self._reason[daemon.gpu] = str(error)
                await daemon.stop()
                raise DaemonFailed(str(error)) from error
            self._reason[daemon.gpu] = (
                f"its control daemon died {DEATHS_MAX} times within {DEATHS_WITHIN_S:g} s"
            )


def _user(pids: frozenset[int]) -> int | None:
    for pid in sorted(pids):
        try:
            return os.stat(f"/proc/{pid}").st_uid
        except OSError:
            continue
    return None


def _one_user(user: int, other: int, gpu: str) -> str:
    return (
        f"it runs as user {user}, and the MPS server of {gpu} serves user {other}: programs must run as one "
        "user to share a GPU through MPS"
    )
