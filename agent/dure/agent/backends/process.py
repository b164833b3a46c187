"""The process back end: a kernel is a process session of this node, under a shim that outlives the agent.

Beside the shim's own files a kernel's folder holds `handle.json` (boot, control groups), written before
the shim starts, so that whatever moment the agent is killed at, the next one finds all there is to find.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dure.agent import sockets
from dure.agent.backends import accounting, cgroups, outcome, view
from dure.agent.backends.base import Abilities, Ended, Handle, Observation, Plan, Tell
from dure.agent.backends.cgroups import Cgroups
from dure.agent.shim import processes
from dure.agent.shim.files import read_json, write_json
from dure.agent.usage import Usage
from dure.agent.waiting import in_thread, is_readable, readable
from dure.fleet.v1 import fleet_pb2

MARKER = "DURE_KERNEL_UID"
# After the grace the shim kills; if it does not end soon after, it is stuck, and the agent kills.
SHIM_PATIENCE_S = 5.0
_PROBE_LIMIT_S = 10.0
_SHIM = f"import sys; sys.path.insert(0, {view.ROOT!r}); from dure.agent.shim.main import main; main()"


@dataclass
class _Watch:
    """Open descriptors: the shim's pidfd (-1: it is gone) and the FIFO on which it tells changes."""

    pidfd: int
    notify: int
    shim_pid: int

    def close(self) -> None:
        for descriptor in (self.pidfd, self.notify):
            if descriptor >= 0:
                os.close(descriptor)
        self.pidfd = self.notify = -1


class ProcessBackend:
    """See `base.Backend`. `home` is the agent's own folder."""

    name = "process"
    contains = False

    def __init__(self, home: Path) -> None:
        self._home = home
        self._watches: dict[str, _Watch] = {}
        # Sockets that were found to be a kernel's own: looking through the descriptors of all its processes
        # costs milliseconds.
        self._own_sockets: dict[str, frozenset[int]] = {}
        # Where to read what a kernel uses, found out at the first look.
        self._groups_of: dict[str, accounting.Groups] = {}
        self._table = accounting.ProcessTable()
        self._cgroups = Cgroups((), ())
        # Why folders cannot be mapped here; empty if they can.
        self._no_maps = "not tried yet"

    async def probe(self) -> Abilities:
        self._cgroups = await asyncio.to_thread(Cgroups.probe)
        self._no_maps = await asyncio.to_thread(_probe_mounts)
        self._write_bin()
        limitations = list(self._cgroups.limitations)
        if self._no_maps:
            limitations.append(
                "sessions see the real model folder instead of their mount destination, and can have neither "
                f"extra mounts, nor shared memory of a given size, nor several kernels: {self._no_maps}"
            )
        return Abilities(
            maps_mounts=not self._no_maps,
            runs_images=False,
            limitations=tuple(limitations),
            no_pinning=self._cgroups.no_pinning,
        )

    def model_place(self, model: Path | None, target: str) -> str:
        return view.model_place(model, target, not self._no_maps)

    async def run(self) -> None:
        return

    async def close(self) -> None:
        return

    async def find(self) -> list[fleet_pb2.KernelSpec]:
        # Nothing is known of a kernel without its folder.
        return []

    async def prepare(self, handle: Handle, spec: fleet_pb2.KernelSpec) -> None:
        return

    async def start(self, plan: Plan, tell: Tell) -> None:
        folder = plan.handle.folder
        content = view.build(plan, self._home, self._no_maps)
        # First: what is made from here on can be found again.
        known = {
            "boot_id": boot_id(),
            "cgroups": [str(path) for path in self._cgroups.folders(plan.handle.uid, bool(plan.cpus))],
        }
        write_json(str(folder / "handle.json"), known)
        groups = await in_thread(
            self._cgroups.create,
            plan.handle.uid,
            plan.cpu_milli,
            plan.memory_bytes,
            plan.cpus,
            plan.memory_nodes,
        )
        content |= {
            "cgroup_procs": groups.procs_files,
            "cgroup_kill": str(groups.kill_file or ""),
            "oom_file": str(groups.oom_file or ""),
        }
        write_json(str(folder / "plan.json"), content)
        notify = _open_notify(folder)
        try:
            pid = _spawn(plan.handle)
        except OSError:
            os.close(notify)
            raise
        self._watches[plan.handle.uid] = _Watch(os.pidfd_open(pid), notify, pid)

    async def adopt(self, handle: Handle) -> bool:
        known = read_json(str(handle.folder / "handle.json"))
        if known is None:
            return (handle.folder / "exit.json").exists()
        if (handle.folder / "exit.json").exists():
            return True
        if known["boot_id"] != boot_id():
            self.write_exit(handle, Ended("NODE_REBOOTED", -1, "the node was restarted while it ran"))
            return True
        state = read_json(str(handle.folder / "state.json"))
        if state is None:
            # Killed between two steps of a start: end what may have begun, and start anew.
            await self._end_all(handle)
            return False
        # The descriptor first: from then on the pid cannot become another process unnoticed.
        pidfd = _pidfd(int(state["shim_pid"]))
        if pidfd >= 0 and processes.start_ticks(int(state["shim_pid"])) != state["shim_start"]:
            os.close(pidfd)
            pidfd = -1
        self._watches[handle.uid] = _Watch(pidfd, _open_notify(handle.folder), int(state["shim_pid"]))
        return True

    async def wait(self, handle: Handle, seen: Observation | None) -> Observation:
        watch = self._watches.get(handle.uid)
        while True:
            over = watch is None or watch.pidfd < 0 or is_readable(watch.pidfd)
            if over:
                await self._see_to_the_end(handle)
            observation = self._observe(handle)
            if observation != seen:
                return observation
            assert watch is not None, "an ended kernel does not change"
            await readable([watch.pidfd, watch.notify])
            with contextlib.suppress(BlockingIOError):
                os.read(watch.notify, 4096)

    async def stop(self, handle: Handle, grace_s: float) -> None:
        watch = self._watches.get(handle.uid)
        if watch is not None and watch.pidfd >= 0:
            number = signal.SIGTERM if grace_s > 0 else signal.SIGUSR1
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watch.pidfd, number)
            if not await readable([watch.pidfd], grace_s + SHIM_PATIENCE_S):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(watch.pidfd, signal.SIGKILL)
                await readable([watch.pidfd], SHIM_PATIENCE_S)
        if watch is not None or (handle.folder / "handle.json").exists():
            await self._see_to_the_end(handle)

    async def clean(self, handle: Handle) -> None:
        known = read_json(str(handle.folder / "handle.json"))
        if known is not None and known["boot_id"] == boot_id():
            await self._end_all(handle)
            await in_thread(cgroups.remove, [Path(path) for path in known["cgroups"]])
        self._groups_of.pop(handle.uid, None)
        self._own_sockets.pop(handle.uid, None)
        watch = self._watches.pop(handle.uid, None)
        if watch is not None:
            watch.close()
            _reap(watch.shim_pid)

    async def processes(self, handle: Handle) -> frozenset[int]:
        return await asyncio.to_thread(self._processes, handle)

    async def complaint(self, handle: Handle, host: str, port: int) -> str:
        inodes, problem = await asyncio.to_thread(sockets.reached, port, host)
        if inodes and inodes == self._own_sockets.get(handle.uid):
            return ""
        pids = await self.processes(handle)
        if problem:
            return problem + await asyncio.to_thread(sockets.elsewhere, port, pids)
        problem = await asyncio.to_thread(sockets.stranger, port, inodes, pids)
        self._own_sockets[handle.uid] = inodes if not problem else frozenset()
        return problem

    def measure(self, handle: Handle) -> Usage | None:
        watch = self._watches.get(handle.uid)
        if watch is None or watch.pidfd < 0:
            return None
        groups = self._groups_of.get(handle.uid)
        if groups is None:
            groups = self._groups_of[handle.uid] = accounting.Groups(self._groups(handle))
        return accounting.look(groups, self._table, watch.shim_pid)

    def log_tail(self, handle: Handle, bytes_max: int) -> str:
        return outcome.log_tail(handle.folder, bytes_max)

    def write_exit(self, handle: Handle, ended: Ended) -> None:
        """Keeps an end that the shim could not write down itself."""
        write_json(
            str(handle.folder / "exit.json"),
            {"reason": ended.reason, "code": ended.code, "message": ended.message, "stopped": ended.by_wish},
        )

    def _observe(self, handle: Handle) -> Observation:
        state = read_json(str(handle.folder / "state.json")) or {}
        record = read_json(str(handle.folder / "exit.json"))
        return Observation(
            pid=int(state.get("pid", 0)) if record is None else 0,
            started_at_s=float(state.get("started_at", 0.0)),
            message=str(state.get("message", "")) if record is None else "",
            ended=outcome.read(record) if record is not None else None,
        )

    async def _see_to_the_end(self, handle: Handle) -> None:
        """The shim is gone: so must be all the rest, and there must be a record of how it ended."""
        watch = self._watches.get(handle.uid)
        if watch is not None and watch.pidfd >= 0:
            _reap(watch.shim_pid)
        if not (handle.folder / "exit.json").exists():
            await self._end_all(handle)
            self.write_exit(
                handle, Ended("LOST", -1, "its supervising process was killed; the exit code is not known")
            )

    async def _end_all(self, handle: Handle) -> None:
        await in_thread(self._end_all_blocking, handle)

    def _end_all_blocking(self, handle: Handle) -> None:
        groups = self._groups(handle)
        if groups:
            cgroups.end(groups)
        # The shim is in no group; without groups the mark in the environment is all there is.
        if not groups or not (handle.folder / "exit.json").exists():
            for pid in processes.marked(f"{MARKER}={handle.uid}"):
                processes.send(pid, signal.SIGKILL)

    def _processes(self, handle: Handle) -> frozenset[int]:
        groups = self._groups(handle)
        if groups:
            # Every process is in all of them.
            return frozenset(cgroups.members(groups[:1]))
        watch = self._watches.get(handle.uid)
        return frozenset(processes.descendants(watch.shim_pid)) if watch is not None else frozenset()

    def _groups(self, handle: Handle) -> list[Path]:
        known = read_json(str(handle.folder / "handle.json")) or {"cgroups": []}
        return [Path(path) for path in known["cgroups"]]

    def _write_bin(self) -> None:
        """Not links: a link to a virtual environment's python, from elsewhere, forgets the environment."""
        folder = self._home / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("python", "python3"):
            temporary = folder / f".{name}"
            temporary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
            temporary.chmod(0o755)
            temporary.replace(folder / name)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _spawn(handle: Handle) -> int:
    errors = (
        os.POSIX_SPAWN_OPEN,
        2,
        str(handle.folder / "shim.log"),
        os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
        0o600,
    )
    silence = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        errors,
    ]
    # Not the agent's environment: join tokens and keys may stand in it.
    environ = {MARKER: handle.uid, "PATH": os.environ.get("PATH", os.defpath), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = [sys.executable, "-I", "-S", "-c", _SHIM, str(handle.folder.absolute())]
    return os.posix_spawn(sys.executable, arguments, environ, file_actions=silence, setsid=True)


def _open_notify(folder: Path) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkfifo(folder / "notify", 0o600)
    # Opened for writing too: a FIFO without a writer is always readable.
    return os.open(folder / "notify", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            return -1
        raise


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _probe_mounts() -> str:
    """Empty if folders can be mapped, else why not."""
    import subprocess

    with tempfile.TemporaryDirectory(prefix="dure-probe-") as folder:
        stage, source = Path(folder) / "stage", Path(folder) / "source"
        stage.mkdir()
        source.mkdir()
        (source / "file").write_text("", encoding="ascii")
        arguments = [sys.executable, "-I", "-S", "-c", _SHIM, "--probe", str(stage), os.path.realpath(source)]
        try:
            done = subprocess.run(
                arguments, capture_output=True, text=True, timeout=_PROBE_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"setting up a mount namespace took longer than {_PROBE_LIMIT_S:g} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the probe exited with code {done.returncode}"
