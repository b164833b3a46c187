"""The verbs of the Docker back end; see the package for its parts.

All that a kernel needs stands on its container as labels. Its folder has beside the log a home, the gate,
what the engine does not keep (`docker.json`: when the command began), and at the end `exit.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dure.agent import sockets
from dure.agent.backends import accounting, cgroups, outcome
from dure.agent.backends.base import (
    HOME,
    Abilities,
    Bind,
    Container,
    Ended,
    Handle,
    Observation,
    Plan,
    StartFailed,
    Tell,
)
from dure.agent.backends.docker import gate, labels, node, request, starting, users
from dure.agent.backends.docker.engine import SLOW_S, Engine, EngineError, NoAnswer, NotThere, Refusal, url
from dure.agent.backends.docker.images import Images
from dure.agent.backends.docker.labels import Owner, Seen
from dure.agent.backends.docker.logs import LogCopy
from dure.agent.backends.docker.networks import Networks
from dure.agent.backends.docker.request import GATE, Image
from dure.agent.backends.docker.watch import Watch
from dure.agent.machine import boot_id
from dure.agent.shim.files import read_json, write_bytes, write_json
from dure.agent.shim.namespace import open_below
from dure.agent.shim.templates import fill
from dure.agent.usage import Usage
from dure.fleet.v1 import fleet_pb2
from dure.wire import identity
from dure.wire.backoff import backoff_s

# An engine may still be coming up when the agent does.
PROBE_S = 30.0
# After SIGKILL; more means that the kernel of the machine holds it.
KILL_S = 15.0
LOG_END_S = 5.0
REAP_S = 60.0
PORT_TRIES = 3
EXEC_S = 2.0
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(eq=False)
class _Kernel:
    """What is known of one kernel. `begun_s` is CLOCK_BOOTTIME at the start of its command, 0 before."""

    log: LogCopy
    container: str = ""
    # Whose network it may have a part in.
    session: str = ""
    seen: Seen | None = None
    begun_s: float = 0.0
    stopping: bool = False
    groups: accounting.Groups | None = None
    folders: list[Path] = field(default_factory=list)


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
        self._kernels: dict[str, _Kernel] = {}
        self._table = accounting.ProcessTable()
        # Kernels that had a container when this agent began; None before that was looked at.
        self._found: frozenset[str] | None = None
        self._gpus = ""
        self._chooses_ports = True
        self._hard_limits: Mapping[str, int] = {}

    async def probe(self) -> Abilities:
        if not self._engine.url.startswith("unix://"):
            raise OSError(
                f"the container engine at {self._engine.url} is not on this node: folders of kernels could "
                "not be mounted; set DOCKER_HOST to its socket, such as unix:///var/run/docker.sock"
            )
        info = await self._first_answer()
        version = await self._engine.call(lambda client: client.version())
        self._chooses_ports = node.chooses_ports(version)
        self._gpus = await asyncio.to_thread(node.gpus, info)
        self._hard_limits = await asyncio.to_thread(node.hard_limits, self._engine.socket)
        found = node.limitations(info, root=os.geteuid() == 0)
        no_devices = {} if self._gpus else {"cuda": node.no_gpus(info)}
        return Abilities(
            maps_mounts=True,
            runs_images=True,
            limitations=tuple(found),
            no_devices=no_devices,
            can_be_strict=True,
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
            group.create_task(self._watch.run(self._owner))
            group.create_task(self._reap())

    async def close(self) -> None:
        await self._images.close()
        await asyncio.gather(*(kernel.log.close() for kernel in self._kernels.values()))

    def model_place(self, model: Path | None, target: str) -> str:
        return target

    async def find(self) -> list[fleet_pb2.KernelSpec]:
        specs = []
        for listed in await self._insist(self._own):
            spec = labels.spec_of(listed["Labels"])
            if spec is None:
                _log.warning(
                    "container %s is this agent's and says nothing whole of itself", listed["Id"][:12]
                )
                await self._remove(listed["Id"])
            else:
                specs.append(spec)
        self._found = frozenset(spec.uid for spec in specs)
        return specs

    async def start(self, plan: Plan, tell: Tell) -> None:
        container = plan.container
        assert container is not None, "a contained kernel has one"
        self._watch.expect(plan.handle.uid)
        try:
            await self._start(plan, container, tell)
        except Refusal as error:
            raise starting.failed(str(error), plan) from error
        except NoAnswer as error:
            raise StartFailed(f"{error}: it could not be started on this node") from error

    async def _start(self, plan: Plan, container: Container, tell: Tell) -> None:
        """Raises StartFailed, or EngineError."""
        spec = container.spec
        image = await self._images.provide(spec.image, spec.image_pull_policy, container.credential, tell)
        if not request.command(plan, image):
            raise StartFailed(
                f"image `{spec.image}` has no command of its own: give the endpoint a start command"
            )
        tell("starting", None)
        handle = plan.handle
        # Of a start that was broken off.
        for listed in await self._of(handle.uid):
            await self._remove(listed["Id"])
        kernel = self._kernels[handle.uid] = _Kernel(self._log_of(handle), session=spec.session_uid)
        binds, checks = await asyncio.to_thread(self._prepare, plan)
        try:
            network = await self._networks.provide(spec, self._known_owner()) if container.names else ""
            await self._create_and_begin(plan, container, image, binds, network, kernel)
            if container.strict:
                await asyncio.to_thread(_refuse_superuser, kernel.seen.pid if kernel.seen else 0)
            await asyncio.to_thread(_same, checks, kernel.seen.pid if kernel.seen else 0)
            if plan.actions:
                passing = gate.Gate(self._engine, kernel.container, plan, self._environ(plan), kernel.log)
                await passing.pass_through(request.command(plan, image), tell)
        except BaseException:
            await self._discard(kernel)
            raise
        finally:
            for descriptor, _ in checks:
                os.close(descriptor)
        kernel.begun_s = _boottime_s()
        write_json(str(handle.folder / "docker.json"), {"begun_s": kernel.begun_s, "boot_id": boot_id()})
        self._watch.wake(handle.uid)

    async def adopt(self, handle: Handle) -> bool:
        if (handle.folder / "exit.json").exists():
            return True
        kept = read_json(str(handle.folder / "docker.json"))
        if kept is None and self._found is not None and handle.uid not in self._found:
            # New: an engine that hangs is found out by its start.
            return False
        found = await self._insist(lambda: self._look(handle.uid))
        if found is None:
            if kept is None:
                return False
            self.write_exit(handle, _gone(kept))
            return True
        session = found.labels.get(labels.SESSION, "")
        kernel = _Kernel(self._log_of(handle), found.id, session, found)
        self._kernels[handle.uid] = kernel
        if not found.running and not found.started_s:
            await self._insist(lambda: self._remove(found.id))
            return False
        if found.running:
            self._find_groups(kernel)
            if found.gated and gate.waits(self._pids(kernel)):
                # Killed between two actions: end what has begun, and start anew.
                await self._insist(lambda: self._remove(found.id))
                return False
        kernel.begun_s = float((kept or {}).get("begun_s", 0.0)) or _boottime_of(found.started_s)
        if kept is None:
            write_json(str(handle.folder / "docker.json"), {"begun_s": kernel.begun_s, "boot_id": boot_id()})
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
            found = await self._look(handle.uid, kernel.container)
        except EngineError:
            return None
        if found is None:
            self.write_exit(handle, _gone({"boot_id": boot_id()}))
        elif not found.running:
            await kernel.log.finished(LOG_END_S)
            self._write_end(handle, found, stopped=kernel.stopping)
        else:
            if kernel.seen is None or kernel.seen.pid != found.pid:
                kernel.groups = None
            kernel.seen = found
            return Observation(pid=found.pid, started_at_s=kernel.begun_s, port=found.port)
        kernel.seen = found
        return Observation(ended=outcome.read(read_json(str(handle.folder / "exit.json")) or {}))

    async def stop(self, handle: Handle, grace_s: float) -> None:
        kernel = self._kernels.get(handle.uid)
        found = await self._look(handle.uid, kernel.container if kernel else "")
        if kernel is not None:
            kernel.stopping = True
        if found is not None and found.running:
            if grace_s > 0:
                await self._kill(found.id, found.stop_signal)
                found = await self._until_ended(handle.uid, found, grace_s)
            if found is not None and found.running:
                await self._kill(found.id, "SIGKILL")
                found = await self._until_ended(handle.uid, found, KILL_S)
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
        for listed in await self._of(handle.uid):
            session = listed["Labels"].get(labels.SESSION, "")
            await self._remove(listed["Id"])
        if session and self._owner() is not None:
            await self._networks.release(session, self._known_owner())
        self._watch.forget(handle.uid)

    async def processes(self, handle: Handle) -> frozenset[int]:
        kernel = self._kernels.get(handle.uid)
        return await asyncio.to_thread(self._pids, kernel) if kernel is not None else frozenset()

    async def complaint(self, handle: Handle, host: str, port: int) -> str:
        kernel = self._kernels.get(handle.uid)
        if kernel is None or kernel.seen is None or not kernel.seen.pid:
            return "its container does not run"
        pids = await asyncio.to_thread(self._pids, kernel)
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
            self._find_groups(kernel)
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

    async def _create(
        self,
        plan: Plan,
        container: Container,
        image: Image,
        binds: Sequence[Bind],
        network: str,
        kernel: _Kernel,
    ) -> None:
        words: tuple[str, ...] = ()
        if plan.actions:
            words = gate.WAITING
        elif request.has_own_command(plan):
            values = {"model_path": plan.model_path, "port": str(plan.port)}
            words = tuple(fill(word, values) for word in request.command(plan, image))
        at = await asyncio.to_thread(node.publish_at, container.host)
        ports = range(0) if container.shares_network else await container.free_ports()
        if ports and not self._chooses_ports:
            one = random.choice(ports)
            ports = range(one, one + 1)
        body = request.body(
            plan,
            container,
            image,
            request.Node(at, ports, self._gpus, self._hard_limits),
            labels=labels.labels(
                container.spec,
                self._known_owner(),
                container.agent,
                boot_id(),
                port=plan.port,
                own_network=not container.shares_network,
                gated=bool(plan.actions),
            ),
            binds=binds,
            command=words,
            network=network,
        )
        name = f"dure-{container.spec.endpoint}-{plan.handle.uid[-12:]}-{self._known_owner().mark}"
        made = await self._engine.call(
            lambda client: client.create_container_from_config(body, name), SLOW_S, whole=True
        )
        kernel.container = str(made["Id"])
        owner = await self._user_of(kernel.container, request.user(image, container.strict))
        await asyncio.to_thread(users.give, plan.handle.folder / "home", owner)

    async def _user_of(self, container: str, user: str) -> tuple[int, int] | None:
        if users.is_plain(user):
            return users.numbers(user)
        try:
            passwd = await self._engine.call(
                lambda client: users.unpack(client.get_archive(container, "/etc/passwd")[0])
            )
        except NotThere:
            passwd = ""
        return users.numbers(user, passwd)

    async def _create_and_begin(
        self,
        plan: Plan,
        container: Container,
        image: Image,
        binds: Sequence[Bind],
        network: str,
        kernel: _Kernel,
    ) -> None:
        """Until its command runs, or it has ended."""
        for left in reversed(range(PORT_TRIES)):
            await self._create(plan, container, image, binds, network, kernel)
            try:
                await self._begin(kernel)
                break
            except Refusal as error:
                # Nothing of it ran: somebody was faster with each of the ports.
                if not left or starting.failed(str(error), plan).reason != "PORT_FAILED":
                    raise
                await self._remove(kernel.container)
        if kernel.seen is not None and kernel.seen.pid:
            await asyncio.to_thread(_wait_for_exec, kernel.seen.pid)

    async def _begin(self, kernel: _Kernel) -> None:
        await self._engine.call(lambda client: client.start(kernel.container), SLOW_S, whole=True)
        inspected = await self._engine.call(lambda client: client.inspect_container(kernel.container))
        kernel.seen = labels.seen(inspected)
        kernel.log.follow(kernel.container)

    def _prepare(self, plan: Plan) -> tuple[list[Bind], list[tuple[int, str]]]:
        """What the container mounts, and descriptors of folders within folders with where they must appear:
        who may write beside such a folder could exchange it for a link before the engine looks."""
        folder = plan.handle.folder
        home = folder / "home"
        home.mkdir(mode=0o700, exist_ok=True)
        if plan.cluster is not None:
            ssh = home / ".ssh"
            ssh.mkdir(mode=0o700, exist_ok=True)
            for name, (content, mode) in plan.cluster.ssh(HOME).items():
                write_bytes(str(ssh / name), content.encode())
                (ssh / name).chmod(mode)
        binds = [Bind(os.path.realpath(home), HOME, False)]
        if plan.model is not None:
            binds.append(Bind(os.path.realpath(plan.model), plan.model_target, True))
        if plan.actions:
            gate.make(folder)
            binds.append(Bind(os.path.realpath(folder / "gate"), GATE, True))
        checks: list[tuple[int, str]] = []
        for extra in plan.extra_mounts:
            source = os.path.realpath(extra.source)
            if extra.subpath:
                descriptor = open_below(source, extra.subpath)
                checks.append((descriptor, extra.target))
                source = os.path.normpath(f"{source}/{extra.subpath}")
            binds.append(Bind(source, extra.target, not extra.writable))
        return binds, checks

    def _environ(self, plan: Plan) -> dict[str, str]:
        return {**plan.environ, **plan.injection.environ, "HOME": HOME}

    def _log_of(self, handle: Handle) -> LogCopy:
        return LogCopy(self._engine, handle.folder)

    def _owner(self) -> Owner | None:
        """None before the agent has joined: it can own nothing then."""
        who = identity.load(self._home)
        return Owner(who.uid, str(self._home.absolute())) if who is not None else None

    def _known_owner(self) -> Owner:
        owner = self._owner()
        assert owner is not None, "kernels come from a manager that the agent has joined"
        return owner

    async def _own(self) -> list[dict[str, Any]]:
        owner = self._owner()
        if owner is None:
            return []
        found: list[dict[str, Any]] = await self._engine.call(
            lambda client: client.containers(all=True, filters={"label": owner.filters})
        )
        return found

    async def _of(self, uid: str) -> list[dict[str, Any]]:
        owner = self._owner()
        if owner is None:
            return []
        wanted = [*owner.filters, f"{labels.KERNEL}={uid}"]
        found: list[dict[str, Any]] = await self._engine.call(
            lambda client: client.containers(all=True, filters={"label": wanted})
        )
        return found

    async def _look(self, uid: str, container: str = "") -> Seen | None:
        """None if there is no container of the kernel. Raises EngineError."""
        if not container:
            listed = await self._of(uid)
            if not listed:
                return None
            container = listed[0]["Id"]
        try:
            return labels.seen(await self._engine.call(lambda client: client.inspect_container(container)))
        except NotThere:
            return None

    async def _insist(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """Until the engine answers: one that hangs while an agent starts must not end kernels that run."""
        attempt = 0
        while True:
            try:
                return await ask()
            except NoAnswer as error:
                attempt += 1
                if attempt == 1:
                    _log.warning("cannot look at a kernel's container yet: %s", error)
            await asyncio.sleep(backoff_s(attempt, first_s=0.2, max_s=5.0, jitter=0.0))

    async def _kill(self, container: str, signal: str) -> None:
        # Not running any more is what was wanted.
        with contextlib.suppress(Refusal):
            await self._engine.call(lambda client: client.kill(container, signal))

    async def _until_ended(self, uid: str, found: Seen, limit_s: float) -> Seen | None:
        """The container once it has ended, or after `limit_s`; None if it is gone."""
        deadline_s = time.monotonic() + limit_s
        pause_s = 0.05
        now: Seen | None = found
        while now is not None and now.running and (left_s := deadline_s - time.monotonic()) > 0:
            await self._watch.moved(uid, min(pause_s, left_s))
            pause_s = min(pause_s * 2, 1.0)
            now = await self._look(uid, found.id)
        return now

    async def _remove(self, container: str) -> None:
        with contextlib.suppress(NotThere):
            await self._engine.call(
                lambda client: client.remove_container(container, force=True, v=True), SLOW_S, whole=True
            )

    async def _discard(self, kernel: _Kernel) -> None:
        """A start that failed leaves nothing; what the engine does not remove now, it is asked again for."""
        if kernel.container:
            with contextlib.suppress(EngineError):
                await self._remove(kernel.container)
        await kernel.log.close()

    async def _reap(self) -> None:
        """Removes containers and networks of this agent whose kernels are gone, once in a while."""
        while True:
            await asyncio.sleep(REAP_S)
            try:
                for listed in await self._own():
                    uid = listed["Labels"].get(labels.KERNEL, "")
                    if uid in self._kernels or (self._home / "kernels" / uid).exists():
                        continue
                    _log.warning("removing container %s, whose kernel %s is gone", listed["Id"][:12], uid)
                    await self._remove(listed["Id"])
                owner = self._owner()
                if owner is not None:
                    await self._networks.tidy(owner)
            except EngineError as error:
                _log.warning("cannot look for what was left behind: %s", error)

    def _find_groups(self, kernel: _Kernel) -> None:
        assert kernel.seen is not None
        kernel.folders = cgroups.folders_of(kernel.seen.pid) if kernel.seen.pid else []

    def _pids(self, kernel: _Kernel) -> frozenset[int]:
        if not kernel.folders and kernel.seen is not None:
            self._find_groups(kernel)
        return frozenset(cgroups.members(kernel.folders[:1]))


def _gone(kept: Mapping[str, Any]) -> Ended:
    """The end of a kernel whose container was there and is not any more."""
    if kept.get("boot_id") != boot_id():
        return Ended("NODE_REBOOTED", -1, "the node was restarted while it ran")
    return Ended("LOST", -1, "its container was removed by somebody else than its agent")


def _same(checks: Sequence[tuple[int, str]], pid: int) -> None:
    """Raises StartFailed if something else than the folder that was looked at appears in the container."""
    for descriptor, target in checks:
        wanted = os.fstat(descriptor)
        try:
            found = os.stat(f"/proc/{pid}/root{target}")
        except (PermissionError, FileNotFoundError):
            # Not root, or over already: this agent cannot look.
            return
        except OSError as error:
            raise StartFailed(f"cannot look at the folder that appears at {target}: {error}") from error
        if (found.st_dev, found.st_ino) != (wanted.st_dev, wanted.st_ino):
            raise StartFailed(f"the folder for {target} was exchanged while it was mounted", "FOLDER_FAILED")


def _refuse_superuser(pid: int) -> None:
    """Raises StartFailed if a process of a strict kernel is the superuser: of the user's name that an image
    has, only its own table tells the number."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        # Over already.
        return
    line = next(line for line in status.splitlines() if line.startswith("Uid:"))
    if "0" in line.split()[1:]:
        raise StartFailed(
            "the user of its image is the superuser by another name, which its security profile `strict` "
            "does not allow: use an image with another user, or one that names none"
        )


def _wait_for_exec(pid: int) -> None:
    """Until the engine's init, a container's first process, has become a command in its child, or has
    ended."""
    deadline_s = time.monotonic() + EXEC_S
    while time.monotonic() < deadline_s:
        try:
            init = os.readlink(f"/proc/{pid}/exe")
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
            if any(os.readlink(f"/proc/{child}/exe") != init for child in children):
                return
        except OSError:
            # It has ended, or this agent may not look.
            return
        time.sleep(0.005)


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
