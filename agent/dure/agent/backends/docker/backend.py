"""The verbs of the Docker back end; see the package for its parts.

All that a kernel needs stands on its container as labels. Its folder has beside the log a home, the gate,
what the engine does not keep (`docker.json`: when the command began), and at the end `exit.json`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dure.agent import sockets
from dure.agent.backends import accounting, outcome
from dure.agent.backends.base import (
    Abilities,
    Ended,
    Handle,
    Observation,
    Plan,
    StartFailed,
    Tell,
)
from dure.agent.backends.docker import gate, labels, node, starting, swarm
from dure.agent.backends.docker.containers import Containers, Kernel, insist
from dure.agent.backends.docker.engine import Engine, EngineError, NoAnswer, Refusal, url
from dure.agent.backends.docker.images import Images
from dure.agent.backends.docker.labels import Seen
from dure.agent.backends.docker.logs import LogCopy
from dure.agent.backends.docker.networks import Networks
from dure.agent.backends.docker.starter import Facts, Starter
from dure.agent.backends.docker.watch import Watch
from dure.agent.machine import boot_id
from dure.agent.shim.files import read_json, write_json
from dure.agent.usage import Usage
from dure.fleet.v1 import fleet_pb2

# An engine may still be coming up when the agent does. Less than what others wait for an agent.
PROBE_S = 20.0
# After SIGKILL; more means that the kernel of the machine holds it.
KILL_S = 15.0
LOG_END_S = 5.0
REAP_S = 60.0
# An engine takes some tenths of a second from killing a container to its removal.
REMOVAL_S, REMOVAL_LOOKS = 1.0, 5
# 128 + SIGKILL.
KILLED = 137
OOM_S, OOM_LOOKS = 0.2, 4
PAUSED = "its container is paused: `docker unpause` lets it go on"
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class DockerBackend:
    """See `base.Backend`. `home` is the agent's own folder; DOCKER_HOST says where the engine listens."""

    name = "docker"
    contains = True

    def __init__(self, home: Path) -> None:
        self._home = home
        self._engine = Engine(url())
        self._images = Images(self._engine)
        self._networks = Networks(self._engine)
        self._watch = Watch(self._engine)
        self._containers = Containers(self._engine, self._watch, home)
        self._kernels: dict[str, Kernel] = {}
        self._table = accounting.ProcessTable()
        # Kernels that had a container when this agent began; None before that was looked at.
        self._found: frozenset[str] | None = None
        self._facts = Facts()

    async def probe(self) -> Abilities:
        if not self._engine.url.startswith("unix://"):
            raise OSError(
                f"the container engine at {self._engine.url} is not on this node: folders of kernels could "
                "not be mounted; set DOCKER_HOST to its socket, such as unix:///var/run/docker.sock"
            )
        info = await self._first_answer()
        version = await self._engine.call(lambda client: client.version())
        self._facts = Facts(
            gpus=await asyncio.to_thread(node.gpus, info),
            chooses_ports=node.chooses_ports(version),
            hard_limits=await asyncio.to_thread(node.hard_limits, self._engine.socket),
        )
        found = node.limitations(info, root=os.geteuid() == 0)
        overlay = await asyncio.to_thread(swarm.id_of, info)
        if not overlay and swarm.is_member(info):
            found.append(swarm.UNKNOWN)
        no_devices = {} if self._facts.gpus else {"cuda": node.no_gpus(info)}
        return Abilities(
            maps_mounts=True,
            runs_images=True,
            limitations=tuple(found),
            no_devices=no_devices,
            can_be_strict=True,
            overlay=overlay,
            makes_overlay=swarm.is_manager(info),
        )

    async def _first_answer(self) -> Mapping[str, Any]:
        deadline_s = time.monotonic() + PROBE_S
        told = False
        while True:
            try:
                info: dict[str, Any] = await self._engine.call(lambda client: client.info())
                return info
            except EngineError as error:
                if time.monotonic() > deadline_s:
                    raise OSError(
                        f"{error}; is it running, and may this user use its socket? DOCKER_HOST names another"
                    ) from error
                if not told:
                    _log.warning("waiting for the container engine: %s", error)
                    told = True
                await asyncio.sleep(0.5)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch.run(self._containers.owner))
            group.create_task(self._reap())

    async def close(self) -> None:
        await self._images.close()
        await asyncio.gather(*(kernel.log.close() for kernel in self._kernels.values()))

    def model_place(self, model: Path | None, target: str) -> str:
        return target

    async def find(self) -> list[fleet_pb2.KernelSpec]:
        specs = []
        for listed in await insist(self._containers.own):
            spec = labels.spec_of(listed["Labels"])
            if spec is None:
                _log.warning(
                    "container %s is this agent's and says nothing whole of itself", listed["Id"][:12]
                )
                await self._containers.remove(listed["Id"])
            else:
                specs.append(spec)
        self._found = frozenset(spec.uid for spec in specs)
        return specs

    async def prepare(self, handle: Handle, spec: fleet_pb2.KernelSpec) -> None:
        if not spec.cluster.overlay:
            return
        # Removed before its start begins, it must let go of the network all the same.
        self._kernels[handle.uid] = _new(self._engine, handle, session=spec.session_uid)
        try:
            await self._networks.span(spec, self._containers.known_owner())
        except EngineError as error:
            raise StartFailed(f"the network of its session cannot be made: {error}") from error

    async def start(self, plan: Plan, tell: Tell) -> None:
        container = plan.container
        assert container is not None, "a contained kernel has one"
        self._watch.expect(plan.handle.uid)
        handle = plan.handle
        starter = Starter(self._engine, self._containers, self._images, self._networks, self._facts)
        try:
            image = await starter.image(container, plan, tell)
            tell("starting", None)
            kernel = _new(self._engine, handle, session=container.spec.session_uid)
            self._kernels[handle.uid] = kernel
            await starter.start(plan, container, image, kernel, tell)
        except Refusal as error:
            raise starting.failed(str(error), plan) from error
        except NoAnswer as error:
            raise StartFailed(f"{error}: it could not be started on this node") from error
        kernel.begun_s = _boottime_s()
        _keep_begin(handle, kernel.begun_s)
        self._watch.wake(handle.uid)

    async def adopt(self, handle: Handle) -> bool:
        if (handle.folder / "exit.json").exists():
            return True
        kept = read_json(str(handle.folder / "docker.json"))
        if kept is None and self._found is not None and handle.uid not in self._found:
            # New: an engine that hangs is found out by its start.
            return False
        found = await insist(lambda: self._containers.look(handle.uid))
        if found is None:
            if kept is None:
                return False
            self.write_exit(handle, _gone(kept))
            return True
        session = found.labels.get(labels.SESSION, "")
        kernel = _new(self._engine, handle, found.id, session, found)
        self._kernels[handle.uid] = kernel
        if not found.running and not found.started_s:
            await insist(lambda: self._containers.remove(found.id))
            return False
        if found.running and found.gated and gate.waits(await asyncio.to_thread(kernel.pids)):
            # Killed between two actions: end what has begun, and start anew.
            await insist(lambda: self._containers.remove(found.id))
            return False
        kernel.begun_s = float((kept or {}).get("begun_s", 0.0)) or _boottime_of(found.started_s)
        if kept is None:
            _keep_begin(handle, kernel.begun_s)
        kernel.log.follow(found.id)
        return True

    async def wait(self, handle: Handle, seen: Observation | None) -> Observation:
        self._watch.expect(handle.uid)
        while True:
            observation = await self._observe(handle)
            if observation is not None and observation != seen:
                return observation
            await self._watch.moved(handle.uid)

    async def _observe(self, handle: Handle) -> Observation | None:
        """None if the engine does not answer: nothing has changed as far as anybody knows."""
        record = read_json(str(handle.folder / "exit.json"))
        if record is not None:
            return Observation(ended=outcome.read(record))
        kernel = self._kernels[handle.uid]
        try:
            found = await self._containers.look(handle.uid, kernel.container)
        except EngineError:
            return None
        if found is None or (not found.running and await self._was_removed(handle, kernel)):
            self.write_exit(handle, _gone({"boot_id": boot_id()}))
        elif not found.running:
            found = await self._with_oom(handle, kernel, found)
            await kernel.log.finished(LOG_END_S)
            self._write_end(handle, found, stopped=kernel.stopping)
        else:
            if kernel.seen is None or kernel.seen.pid != found.pid:
                kernel.groups = None
            kernel.seen = found
            message = PAUSED if found.status == "paused" else ""
            return Observation(found.pid, kernel.begun_s, message, port=found.port)
        kernel.seen = found
        return Observation(ended=outcome.read(read_json(str(handle.folder / "exit.json")) or {}))

    async def _was_removed(self, handle: Handle, kernel: Kernel) -> bool:
        """Whether it ended because somebody else removed its container: that kills it first, and the
        container is gone a moment later."""
        if kernel.stopping or not self._watch.was_killed(handle.uid):
            return False
        try:
            for _ in range(REMOVAL_LOOKS):
                await asyncio.sleep(REMOVAL_S / REMOVAL_LOOKS)
                if await self._containers.look(handle.uid, kernel.container) is None:
                    return True
        except EngineError:
            return False
        return False

    async def _with_oom(self, handle: Handle, kernel: Kernel, found: Seen) -> Seen:
        """The same container, once it is known whether its memory ran out: an engine hears of that apart from
        the end, and sometimes after it."""
        told = kernel.stopping or self._watch.was_killed(handle.uid)
        for _ in range(OOM_LOOKS):
            if found.oom or found.exit_code != KILLED or told:
                return found
            await asyncio.sleep(OOM_S / OOM_LOOKS)
            try:
                found = await self._containers.look(handle.uid, kernel.container) or found
            except EngineError:
                return found
        return found

    async def stop(self, handle: Handle, grace_s: float) -> None:
        kernel = self._kernels.get(handle.uid)
        found = await self._containers.look(handle.uid, kernel.container if kernel else "")
        if kernel is not None:
            kernel.stopping = True
        if found is not None and found.running:
            if grace_s > 0:
                await self._containers.kill(found.id, found.stop_signal)
                found = await self._containers.until_ended(handle.uid, found, grace_s)
            if found is not None and found.running:
                await self._containers.kill(found.id, "SIGKILL")
                found = await self._containers.until_ended(handle.uid, found, KILL_S)
            if found is not None and found.running:
                raise TimeoutError(f"container {found.id[:12]} does not die")
        if found is not None and found.started_s and not (handle.folder / "exit.json").exists():
            if kernel is not None:
                await kernel.log.finished(LOG_END_S)
            self._write_end(handle, found, stopped=True)
        self._watch.wake(handle.uid)

    async def clean(self, handle: Handle) -> None:
        kernel = self._kernels.pop(handle.uid, None)
        if kernel is not None:
            await kernel.log.close()
        session = kernel.session if kernel is not None else ""
        for listed in await self._containers.of(handle.uid):
            session = listed["Labels"].get(labels.SESSION, "")
            await self._containers.remove(listed["Id"])
        if session and self._containers.owner() is not None:
            await self._networks.release(session, self._containers.known_owner())
        self._watch.forget(handle.uid)

    async def processes(self, handle: Handle) -> frozenset[int]:
        kernel = self._kernels.get(handle.uid)
        return await asyncio.to_thread(kernel.pids) if kernel is not None else frozenset()

    async def complaint(self, handle: Handle, host: str, port: int) -> str:
        kernel = self._kernels.get(handle.uid)
        if kernel is None or kernel.seen is None or not kernel.seen.pid:
            return "its container does not run"
        pids = await asyncio.to_thread(kernel.pids)
        own = kernel.seen.own_port
        if own:
            # The engine accepts every connection to a published port: only a look inside tells.
            return await asyncio.to_thread(_complaint_inside, own, kernel.seen.pid, pids)
        inodes, problem = await asyncio.to_thread(sockets.reached, port, host)
        if problem:
            return problem + await asyncio.to_thread(sockets.elsewhere, port, pids)
        return await asyncio.to_thread(sockets.stranger, port, inodes, pids)

    def measure(self, handle: Handle) -> Usage | None:
        kernel = self._kernels.get(handle.uid)
        if kernel is None or kernel.seen is None or not kernel.seen.pid or not kernel.begun_s:
            return None
        if kernel.groups is None:
            kernel.find_groups()
            kernel.groups = accounting.Groups(kernel.folders)
        usage = accounting.look(kernel.groups, self._table, kernel.seen.pid)
        if not kernel.seen.own_port:
            return usage
        return accounting.with_network(usage, kernel.seen.pid)

    def log_tail(self, handle: Handle, bytes_max: int) -> str:
        return outcome.log_tail(handle.folder, bytes_max)

    def write_exit(self, handle: Handle, ended: Ended) -> None:
        write_json(
            str(handle.folder / "exit.json"),
            {"reason": ended.reason, "code": ended.code, "message": ended.message, "stopped": ended.by_wish},
        )

    def _write_end(self, handle: Handle, found: Seen, *, stopped: bool) -> None:
        why = starting.by_init(found.exit_code, self.log_tail(handle, 1024))
        if why:
            self.write_exit(handle, Ended("START_FAILED", found.exit_code, why, stopped))
        else:
            record = {**labels.ended(found, boot_id()), "stopped": stopped}
            write_json(str(handle.folder / "exit.json"), record)

    async def _reap(self) -> None:
        """Removes containers and networks of this agent whose kernels are gone, once in a while."""
        while True:
            await asyncio.sleep(REAP_S)
            try:
                for listed in await self._containers.own():
                    uid = listed["Labels"].get(labels.KERNEL, "")
                    if uid in self._kernels or (self._home / "kernels" / uid).exists():
                        continue
                    _log.warning("removing container %s, whose kernel %s is gone", listed["Id"][:12], uid)
                    await self._containers.remove(listed["Id"])
                owner = self._containers.owner()
                if owner is not None:
                    await self._networks.tidy(owner)
            except EngineError as error:
                _log.warning("cannot look for what was left behind: %s", error)


def _new(
    engine: Engine, handle: Handle, container: str = "", session: str = "", seen: Seen | None = None
) -> Kernel:
    return Kernel(LogCopy(engine, handle.folder), container, session, seen)


def _keep_begin(handle: Handle, begun_s: float) -> None:
    write_json(str(handle.folder / "docker.json"), {"begun_s": begun_s, "boot_id": boot_id()})


def _gone(kept: Mapping[str, Any]) -> Ended:
    """The end of a kernel whose container was there and is not any more."""
    if kept.get("boot_id") != boot_id():
        return Ended("NODE_REBOOTED", -1, "the node was restarted while it ran")
    return Ended("LOST", -1, "its container was removed by somebody else than its agent")


def _complaint_inside(port: int, pid: int, pids: frozenset[int]) -> str:
    """Whether something of a container listens on its port, for those who come from outside."""
    found = sockets.listeners(port, pid)
    if not found:
        return f"nothing listens on port {port} of its container" + sockets.elsewhere(port, pids, pid)
    if all(one.address.is_loopback for one in found):
        return f"listens on {found[0].address} only, inside of its container: listen on 0.0.0.0"
    return ""


def _boottime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boottime_of(unix_s: float) -> float:
    return _boottime_s() - max(0.0, time.time() - unix_s)
