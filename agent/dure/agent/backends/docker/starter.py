"""Starts of containers: what they mount, making one, and waiting until its command runs. A start that fails
leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dure.agent.backends.base import HOME, Bind, Container, Plan, StartFailed, Tell
from dure.agent.backends.docker import gate, labels, node, request, starting, users
from dure.agent.backends.docker.containers import Containers, Kernel
from dure.agent.backends.docker.engine import SLOW_S, Engine, EngineError, NotThere, Refusal
from dure.agent.backends.docker.images import Images
from dure.agent.backends.docker.networks import Networks
from dure.agent.backends.docker.request import GATE, Image
from dure.agent.machine import boot_id
from dure.agent.shim.files import write_bytes
from dure.agent.shim.namespace import open_below
from dure.agent.shim.templates import fill
from dure.wire.backoff import backoff_s

PORT_TRIES = 3
EXEC_S = 2.0
# Agents that can make an overlay do so as soon as they hear of a session: longer than one takes to come back.
OVERLAY_S = 60.0


@dataclass(frozen=True)
class Facts:
    """What the back end found out of the engine when the agent began: how GPUs are attached, whether it
    chooses a port of several, and its own hard limits."""

    gpus: str = ""
    chooses_ports: bool = True
    hard_limits: Mapping[str, int] = field(default_factory=dict)


class Starter:
    """Lives on one event loop."""

    def __init__(
        self, engine: Engine, containers: Containers, images: Images, networks: Networks, facts: Facts
    ) -> None:
        self._engine = engine
        self._containers = containers
        self._images = images
        self._networks = networks
        self._facts = facts

    async def image(self, container: Container, plan: Plan, tell: Tell) -> Image:
        """The image, on this node, with a command. Raises StartFailed, or EngineError."""
        spec = container.spec
        image = await self._images.provide(spec.image, spec.image_pull_policy, container.credential, tell)
        if not request.command(plan, image):
            raise StartFailed(
                f"image `{spec.image}` has no command of its own: give the endpoint a start command"
            )
        return image

    async def start(self, plan: Plan, container: Container, image: Image, kernel: Kernel, tell: Tell) -> None:
        """Until its command runs, or it has ended. Raises StartFailed, or EngineError."""
        spec = container.spec
        # Of a start that was broken off.
        for listed in await self._containers.of(spec.uid):
            await self._containers.remove(listed["Id"])
        user = request.user(image, container.strict)
        binds, checks = await asyncio.to_thread(_prepare, plan, user)
        try:
            owner = self._containers.known_owner()
            network = await self._networks.provide(spec, owner) if container.names else ""
            await self._create_and_begin(_Start(plan, container, image, binds, network, kernel), tell)
            pid = kernel.seen.pid if kernel.seen is not None else 0
            if container.strict:
                await asyncio.to_thread(_refuse_superuser, pid)
            await asyncio.to_thread(_same, checks, pid)
            if plan.actions:
                environ = {**plan.environ, **plan.injection.environ, "HOME": HOME}
                passing = gate.Gate(self._engine, kernel.container, plan, environ, kernel.log)
                await passing.pass_through(request.command(plan, image), tell)
        except BaseException:
            await self._discard(kernel)
            raise
        finally:
            for descriptor, _ in checks:
                os.close(descriptor)

    async def _create_and_begin(self, start: _Start, tell: Tell) -> None:
        kernel = start.kernel
        for left in reversed(range(PORT_TRIES)):
            await self._create(start)
            try:
                await self._begin(start, tell)
                break
            except Refusal as error:
                # Nothing of it ran: somebody was faster with each of the ports.
                if not left or starting.failed(str(error), start.plan).reason != "PORT_FAILED":
                    raise
                await self._containers.remove(kernel.container)
        kernel.seen = await self._containers.look(start.plan.handle.uid, kernel.container)
        kernel.log.follow(kernel.container)
        seen = kernel.seen
        if seen is not None and seen.pid and not await asyncio.to_thread(_became, seen.pid):
            # What it could not execute, its log tells.
            kernel.seen = await self._containers.until_ended(start.plan.handle.uid, seen, EXEC_S)

    async def _begin(self, start: _Start, tell: Tell) -> None:
        """Starts the container. Waits for the overlay that another node makes: the engine of a swarm's worker
        knows one only once a container of its own is in it, so trying is the way to ask."""
        container, overlay = start.kernel.container, start.container.spec.cluster.overlay
        deadline_s = time.monotonic() + OVERLAY_S
        attempt = 0
        while True:
            try:
                await self._engine.call(lambda client: client.start(container), SLOW_S, whole=True)
                return
            except Refusal as error:
                if not overlay or not starting.lacks_network(str(error), start.network):
                    raise
                if time.monotonic() > deadline_s:
                    raise StartFailed(
                        f"no node made the network `{start.network}` of its session within {OVERLAY_S:g} s "
                        f"({error}): see with `docker node ls` whether a node with an agent is a manager of "
                        "the swarm, and restart the agents of nodes that joined, left, or changed their role"
                    ) from error
            attempt += 1
            tell("waiting for the network of its session, which another node makes", None)
            await asyncio.sleep(backoff_s(attempt, first_s=0.1, max_s=2.0, jitter=0.0))

    async def _create(self, start: _Start) -> None:
        plan, container, owner = start.plan, start.container, self._containers.known_owner()
        at = await asyncio.to_thread(node.publish_at, container.host)
        body = request.body(
            plan,
            container,
            start.image,
            request.Node(at, await self._ports(container), self._facts.gpus, self._facts.hard_limits),
            labels=labels.labels(
                container.spec,
                owner,
                container.agent,
                boot_id(),
                port=plan.port,
                own_network=not container.shares_network,
                gated=bool(plan.actions),
            ),
            binds=start.binds,
            command=start.command,
            network=start.network,
        )
        name = f"dure-{container.spec.endpoint}-{plan.handle.uid[-12:]}-{owner.mark}"
        made: dict[str, Any] = await self._engine.call(
            lambda client: client.create_container_from_config(body, name), SLOW_S, whole=True
        )
        start.kernel.container = str(made["Id"])
        user = await self._user_of(start.kernel.container, request.user(start.image, container.strict))
        await asyncio.to_thread(users.give, plan.handle.folder / "home", user)

    async def _ports(self, container: Container) -> range:
        """Of which the engine publishes one."""
        if container.shares_network:
            return range(0)
        ports = await container.free_ports()
        if self._facts.chooses_ports:
            return ports
        # Kernels that start at one time should not all try the first.
        one = random.choice(ports)
        return range(one, one + 1)

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

    async def _discard(self, kernel: Kernel) -> None:
        """What the engine does not remove now, it is asked for again when the kernel is removed."""
        if kernel.container:
            with contextlib.suppress(EngineError):
                await self._containers.remove(kernel.container)
        await kernel.log.close()


@dataclass(frozen=True)
class _Start:
    """One start under way."""

    plan: Plan
    container: Container
    image: Image
    binds: list[Bind]
    network: str
    kernel: Kernel

    @property
    def command(self) -> tuple[str, ...]:
        """What the container begins with; empty for the image's own."""
        if self.plan.actions:
            return gate.WAITING
        if not request.has_own_command(self.plan):
            return ()
        values = {"model_path": self.plan.model_path, "port": str(self.plan.port)}
        return tuple(fill(word, values) for word in request.command(self.plan, self.image))


def _prepare(plan: Plan, user: str) -> tuple[list[Bind], list[tuple[int, str]]]:
    """What the container mounts, and descriptors of folders within folders with where they must appear: who
    may write beside such a folder could exchange it for a link before the engine looks."""
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
            checks.append((open_below(source, extra.subpath), extra.target))
            source = os.path.normpath(f"{source}/{extra.subpath}")
        if extra.writable and user:
            users.open_to_all(source)
        binds.append(Bind(source, extra.target, not extra.writable))
    return binds, checks


def _same(checks: list[tuple[int, str]], pid: int) -> None:
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


def _became(pid: int) -> bool:
    """Whether the engine's init, a container's first process, has become a command in its child; waits for
    it up to EXEC_S. False if it ended without."""
    deadline_s = time.monotonic() + EXEC_S
    while time.monotonic() < deadline_s:
        try:
            before = os.readlink(f"/proc/{pid}/exe")
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        except PermissionError:
            return True
        except OSError:
            return False
        for child in children:
            # A child that could not execute its command is a dead one, which has none.
            with contextlib.suppress(OSError):
                # The first process is the engine's own program for a moment, before it is init.
                if os.readlink(f"/proc/{child}/exe") not in (before, os.readlink(f"/proc/{pid}/exe")):
                    return True
        time.sleep(0.005)
    return True
