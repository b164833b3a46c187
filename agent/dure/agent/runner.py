"""One kernel on this node, from its spec to its end: prepares, starts, follows, probes and removes it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from dure.agent import clusters, devices, environment, health, machine, numa, ports, prober
from dure.agent.backends import outcome
from dure.agent.backends.base import (
    Backend,
    ClusterFiles,
    Container,
    Ended,
    ExtraMount,
    Handle,
    Injection,
    Observation,
    Plan,
    StartFailed,
)
from dure.agent.backends.outcome import without_message
from dure.agent.counts import Counts
from dure.agent.enforcement.modes import Modes
from dure.agent.folders import Folders
from dure.agent.health import Health, Policy
from dure.agent.kernel import Event
from dure.agent.leases import Leases
from dure.agent.log_archive import LogArchive
from dure.agent.prober import Answer
from dure.agent.serial_starts import SerialStarts
from dure.agent.shim.files import read_json, write_bytes, write_json
from dure.agent.starts import Start
from dure.agent.storage import ManagerStorage
from dure.fleet.v1 import fleet_pb2
from dure.wire.backoff import backoff_s
from dure.wire.errors import DureError, ManagerUnreachable, TimedOut
from dure.wire.tracing import Tracing

LOG_TAIL_BYTES = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """What all kernels of the agent share. `host` is where proxies reach its sessions."""

    agent: str
    host: str
    backend: Backend
    leases: Leases
    folders: Folders
    devices: Mapping[str, fleet_pb2.Device]
    http: aiohttp.ClientSession
    logs: LogArchive
    storage: ManagerStorage
    modes: Modes
    serial: SerialStarts = field(default_factory=SerialStarts)
    counts: Counts = field(default_factory=Counts)
    tracing: Tracing | None = None
    # The machine's NUMA nodes, by number, if kernels are to be pinned to them.
    numa_nodes: Mapping[int, numa.Node] = field(default_factory=dict)


class Runner:
    """Runs one kernel. `emit` is told of events, or None when only the status changed."""

    def __init__(
        self,
        node: Node,
        spec: fleet_pb2.KernelSpec,
        handle: Handle,
        others: Callable[[], Iterable[Sequence[fleet_pb2.DeviceGrant]]],
        emit: Callable[[Event | None], None],
    ) -> None:
        self.spec = spec
        self.handle = handle
        self.ended = False
        self._node = node
        self._others = others
        self._emit = emit
        self._files = str(handle.folder)
        self._policy = _policy_of(spec)
        self._health = health.begin(self._policy)
        self._start: Start | None = None
        self.status = fleet_pb2.KernelStatus(uid=spec.uid, host=node.host)

    def save(self) -> None:
        """Keeps the spec, so that the next agent knows this kernel."""
        self.handle.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(f"{self._files}/spec.pb", self.spec.SerializeToString())

    async def run(self) -> None:
        """Starts it, or goes on where the agent before stopped, until it ended."""
        try:
            adopted = await self._adopt()
            if not adopted:
                self._start = Start(self._node.counts, self._node.tracing, self.spec)
                await self._prepare()
            await self._follow(adopted and (self.handle.folder / "verdict.json").exists())
        except StartFailed as error:
            self._fail(error.reason, str(error))
        except ports.NoPort as error:
            self._fail("PORT_FAILED", str(error))
        except Exception as error:
            # The top of this kernel's task: it must not stay for ever in a phase that it is not in.
            _log.exception("kernel %s broke", self.spec.uid)
            with contextlib.suppress(OSError):
                await self._node.backend.stop(self.handle, 0)
            reason = (
                error.strerror if isinstance(error, OSError) and error.strerror else "see the agent's log"
            )
            self._fail("START_FAILED", f"the node could not run it: {reason}")
        finally:
            self._start_over("was told to go before its command ran")

    def _start_over(self, error: str = "") -> None:
        if self._start is not None:
            self._start.over(error)
            self._start = None

    async def stop(self, grace_s: float) -> None:
        """Ends it and frees what it used, but keeps its folder and with it how it ended."""
        await self._node.backend.stop(self.handle, grace_s)
        if not (self.handle.folder / "exit.json").exists():
            self._node.backend.write_exit(
                self.handle, Ended("LOST", -1, "its agent was stopped before it started")
            )
        await self._node.backend.clean(self.handle)

    async def condemn(self, ended: Ended) -> None:
        """Ends it for a reason of the node's own, which stands in its report in place of what its end looks
        like; also if the agent is killed meanwhile. Raises OSError, or TimeoutError."""
        verdict = {
            "reason": ended.reason,
            "code": ended.code,
            "message": ended.message,
            "stopped": ended.by_wish,
        }
        write_json(f"{self._files}/verdict.json", verdict)
        await self._node.backend.stop(self.handle, self.grace_s)

    def show_enforcement(self, mode: str, detail: str) -> None:
        """What was verified to keep it within its parts of devices, and why it is no better."""
        detail = detail[:1000]
        if (self.status.enforcement, self.status.enforcement_detail) != (mode, detail):
            self.status.enforcement, self.status.enforcement_detail = mode, detail
            self._emit(None)

    async def remove(self) -> None:
        """Ends it and leaves nothing behind. Goes on until that is done."""
        try:
            await self._remove()
        finally:
            self._node.serial.over(self.spec.uid)

    async def _remove(self) -> None:
        attempt = 0
        while True:
            try:
                if self.handle.folder.exists():
                    await self._node.backend.stop(self.handle, self.grace_s)
                    await self._node.backend.clean(self.handle)
                    await self._node.leases.release(self.handle.folder)
                    await self._keep_log()
                    await asyncio.to_thread(_remove_folder, self.handle.folder)
                return
            except (OSError, TimeoutError) as error:
                attempt += 1
                _log.warning("kernel %s resists its removal: %s", self.spec.uid, error)
                self._say(f"cannot be removed yet: {error}")
                await asyncio.sleep(backoff_s(attempt, first_s=0.2, max_s=5.0, jitter=0.0))

    async def _keep_log(self) -> None:
        try:
            await asyncio.to_thread(self._node.logs.keep, self.spec.uid, self.handle.folder)
        except OSError as error:
            # Its log is lost; the kernel must go nevertheless.
            _log.warning("the log of kernel %s cannot be kept: %s", self.spec.uid, error)

    @property
    def grace_s(self) -> float:
        return self.spec.stop_grace_ms / 1000

    async def _adopt(self) -> bool:
        if not await self._node.backend.adopt(self.handle):
            return False
        self._node.serial.hold(self.spec)
        known = read_json(f"{self._files}/kernel.json") or {}
        self.status.port = int(known.get("port", 0))
        return True

    async def _prepare(self) -> None:
        refusal = devices.refusal(self.spec.devices, self._node.devices, self._others())
        if refusal:
            raise StartFailed(refusal)
        if (
            self.spec.security_profile == fleet_pb2.SECURITY_PROFILE_STRICT
            and not self._node.backend.contains
        ):
            raise StartFailed(
                "this node runs sessions without containers, and cannot keep one to the security profile "
                "`strict`: choose a resource group whose agents run images"
            )
        model: Path | None = None
        if self.spec.model.folder_uid:
            self._say("getting the model folder")
            model = await self._node.folders.provide(self.spec.model, self.handle.folder)
        extra = [await self._extra_mount(mount) for mount in self.spec.extra_mounts]
        cluster = await self._join_cluster() if clusters.size(self.spec) > 1 else None
        # Several kernels on one host cannot all have the number; only main1 is reached by it.
        fixed = self.spec.fixed_port and clusters.is_probed(self.spec)
        if self._own_network:
            port = self.spec.port
        else:
            port = await self._node.leases.lease(self.handle.folder, self.spec.port if fixed else 0)
            self.status.port = port
            write_json(f"{self._files}/kernel.json", {"port": port})
        injection = await self._node.modes.prepare(self.spec, self.handle)
        await self._node.serial.take(self.spec, self._say)
        self._say("starting")
        await self._node.backend.start(self._plan(model, tuple(extra), cluster, port, injection), self._tell)

    @property
    def _own_network(self) -> bool:
        """Whether it has a network of its own: contained, and not of a session that spans nodes."""
        spans = clusters.size(self.spec) > 1 and not self.spec.cluster.one_node
        return self._node.backend.contains and not spans

    async def _extra_mount(self, mount: fleet_pb2.Mount) -> ExtraMount:
        self._say(f"getting folder `{mount.folder}`")
        source = await self._node.folders.provide(mount, self.handle.folder)
        return ExtraMount(mount.folder, source, mount.subpath, mount.target, mount.writable)

    async def _join_cluster(self) -> ClusterFiles:
        """Takes its place among the kernels of its session. Raises StartFailed, or ports.NoPort."""
        place, keys = self.spec.cluster, self.spec.ssh_keys
        problem = clusters.problem(place)
        if problem:
            raise StartFailed(f"the session makes no sense: {problem}")
        own_network = self._own_network
        if clusters.host(self.spec) == place.hosts[0] and not own_network:
            await self._node.leases.lease_rendezvous(self.handle.folder, place.rendezvous_port)
        addresses = []
        # The engine's own names stand for those of a session that has a network of its own.
        reached = () if own_network else zip(place.hosts, place.addresses, strict=True)
        for name, address in reached:
            try:
                addresses.append(await machine.resolve(address))
            except OSError as error:
                why = error.strerror or error
                raise StartFailed(
                    f"the address `{address}` of `{name}` is not known on this node: {why}"
                ) from error
        table = await asyncio.to_thread(machine.host_table)
        return ClusterFiles(
            clusters.host_table(table, place.hosts[: len(addresses)], addresses),
            lambda home: (
                clusters.ssh_files(keys, place.hosts, home) if self.spec.HasField("ssh_keys") else {}
            ),
            tuple(addresses),
        )

    def _plan(
        self,
        model: Path | None,
        extra: tuple[ExtraMount, ...],
        cluster: ClusterFiles | None,
        port: int,
        injection: Injection,
    ) -> Plan:
        spec = self.spec
        target = os.path.normpath(spec.model.target or "/models")
        place = self._node.backend.model_place(model, target)
        environ = environment.build(
            spec,
            agent=self._node.agent,
            port=port,
            model_place=place,
            devices=self._node.devices,
            # An image has its own PATH and libraries.
            inherited={} if self._node.backend.contains else os.environ,
        )
        pin = self._pin()
        return Plan(
            handle=self.handle,
            model=model,
            model_target=target,
            model_path=spec.command.model_path or target,
            argv=tuple(spec.command.argv.args),
            shell=spec.command.shell.shell or ("/bin/bash" if spec.command.HasField("shell") else ""),
            line=spec.command.shell.line,
            actions=tuple(_action(action) for action in spec.pre_start_actions),
            environ={**environ, **injection.environ},
            port=port,
            cpu_milli=spec.slots.get("cpu", 0),
            memory_bytes=spec.slots.get("mem", 0) // 1000,
            stop_grace_s=self.grace_s,
            extra_mounts=extra,
            shared_memory_bytes=spec.shared_memory_bytes,
            cluster=cluster,
            cpus=pin.cpus,
            memory_nodes=pin.memory_nodes,
            injection=injection,
            container=self._container(cluster) if self._node.backend.contains else None,
        )

    def _container(self, cluster: ClusterFiles | None) -> Container:
        spec = self.spec
        granted = (grant.device for grant in spec.devices)
        return Container(
            spec=spec,
            agent=self._node.agent,
            host=self._node.host,
            hostname=clusters.host(spec),
            devices=tuple(self._node.devices[device] for device in granted),
            credential=self._credential,
            free_ports=self._node.leases.gap,
            names=tuple(spec.cluster.hosts) if cluster is not None else (),
            addresses=cluster.addresses if cluster is not None else (),
        )

    async def _credential(self) -> tuple[str, str]:
        attempt = 0
        while True:
            try:
                return await self._node.storage.image_credential(self.spec.uid)
            except (ManagerUnreachable, TimedOut):
                attempt += 1
                self._say("waiting for the manager, for the credential of its image's registry")
            except DureError as error:
                message = f"cannot get the credential for image `{self.spec.image}`: {error}"
                raise StartFailed(message, "IMAGE_FAILED") from error
            await asyncio.sleep(backoff_s(attempt, first_s=0.2, max_s=5.0, jitter=0.0))

    def _pin(self) -> numa.Pin:
        granted = [self._node.devices[grant.device] for grant in self.spec.devices]
        cpu_milli, memory_bytes = self.spec.slots.get("cpu", 0), self.spec.slots.get("mem", 0) // 1000
        return numa.pin(granted, cpu_milli, memory_bytes, self._node.numa_nodes)

    async def _follow(self, condemned: bool) -> None:
        """`condemned`: the agent before began to end it."""
        seen: Observation | None = None
        probing: asyncio.Task[None] | None = None
        ending = asyncio.create_task(self._go_on_ending()) if condemned else None
        started = False
        try:
            while True:
                seen = await self._node.backend.wait(self.handle, seen)
                self.status.pid = seen.pid
                if seen.port and seen.port != self.status.port:
                    self.status.port = seen.port
                    await self._node.leases.claim(self.handle.folder, seen.port)
                self.status.message = seen.message
                if seen.ended is not None:
                    self._end(seen.ended)
                    return
                if not seen.started_at_s or started:
                    self._emit(None)
                    continue
                started = True
                self._start_over()
                self._node.serial.began(self.spec, prober.now_s() - seen.started_at_s)
                if clusters.is_probed(self.spec):
                    self._resume_health(seen.started_at_s)
                    probing = asyncio.create_task(self._probe(seen.started_at_s))
                self._emit(Event.STARTED)
        finally:
            running = [task for task in (probing, ending) if task is not None]
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)

    async def _go_on_ending(self) -> None:
        attempt = 0
        while True:
            try:
                await self._node.backend.stop(self.handle, self.grace_s)
                return
            except (OSError, TimeoutError) as error:
                attempt += 1
                _log.warning("kernel %s resists its end: %s", self.spec.uid, error)
                await asyncio.sleep(backoff_s(attempt, first_s=0.2, max_s=5.0, jitter=0.0))

    async def _probe(self, started_at_s: float) -> None:
        attempt = 0
        while True:
            try:
                await prober.probe_on(
                    self._node.http, self._target(), self._policy, self._health, started_at_s, self._record
                )
            except Exception:
                attempt += 1
                _log.exception("probing of kernel %s broke; beginning again", self.spec.uid)
                await asyncio.sleep(backoff_s(attempt, first_s=1.0, max_s=30.0, jitter=0.0))

    def _target(self) -> prober.Target:
        check = self.spec.health_check
        return prober.Target(
            self._node.host, self.status.port, check.path, check.expected_status_code or 200, self._complaint
        )

    async def _complaint(self) -> str:
        return await self._node.backend.complaint(self.handle, self._node.host, self.status.port)

    def _record(self, current: Health, answer: Answer) -> None:
        self._node.counts.probes.add("success" if answer.success else "failure")
        before = (self.status.health, self.status.consecutive_failures, self.status.probe_detail)
        self._health = current
        if current.state is health.State.HEALTHY:
            self._node.serial.over(self.spec.uid)
        self.status.health = fleet_pb2.KernelHealth.ValueType(current.state.value)
        self.status.consecutive_failures = current.failures
        self.status.probe_status_code = answer.status_code
        self.status.probe_detail = answer.detail
        if before != (self.status.health, current.failures, answer.detail):
            kept: dict[str, Any] = {
                "state": current.state.value,
                "failures": current.failures,
                "status_code": answer.status_code,
                "detail": answer.detail,
            }
            write_json(f"{self._files}/health.json", kept)
            self._emit(None)

    def _resume_health(self, started_at_s: float) -> None:
        kept = read_json(f"{self._files}/health.json") or {
            "state": health.State.DEGRADED.value,
            "failures": 0,
            "status_code": 0,
            "detail": "",
        }
        elapsed_s = prober.now_s() - started_at_s
        self._health = health.resume(self._policy, health.State(kept["state"]), kept["failures"], elapsed_s)
        if self._health.state is health.State.HEALTHY:
            self._node.serial.over(self.spec.uid)
        self.status.health = fleet_pb2.KernelHealth.ValueType(kept["state"])
        self.status.consecutive_failures = kept["failures"]
        self.status.probe_status_code = kept["status_code"]
        self.status.probe_detail = kept["detail"]

    def _fail(self, reason: str, message: str) -> None:
        ended = Ended(reason, -1, message)
        if not (self.handle.folder / "exit.json").exists():
            self._node.backend.write_exit(self.handle, ended)
        self._end(ended)

    def _end(self, ended: Ended) -> None:
        verdict = read_json(f"{self._files}/verdict.json")
        if verdict is not None:
            ended = outcome.read(verdict)
        self.ended = True
        self._node.serial.over(self.spec.uid)
        self.status.ClearField("pull")
        self._node.counts.ends.add(ended.reason)
        self._start_over(ended.message or ended.reason)
        self.status.pid = 0
        self.status.exit.CopyFrom(
            fleet_pb2.KernelExit(
                reason=ended.reason,
                code=ended.code,
                log_tail=without_message(
                    self._node.backend.log_tail(self.handle, LOG_TAIL_BYTES), ended.message
                ),
                message=ended.message[:4000],
            )
        )
        self.status.message = ended.message[:4000]
        self._emit(Event.ENDED)

    def _say(self, message: str) -> None:
        self._tell(message, None)

    def _tell(self, message: str, pull: fleet_pb2.ImagePull | None) -> None:
        self.status.message = message
        self.status.ClearField("pull")
        if pull is not None:
            self.status.pull.CopyFrom(pull)
        self._emit(None)


def _policy_of(spec: fleet_pb2.KernelSpec) -> Policy | None:
    if not spec.HasField("health_check"):
        return None
    check = spec.health_check
    return Policy(
        # A schedule of zero would be a busy loop; the manager never sends one.
        interval_s=max(check.interval_ms, 10) / 1000,
        max_retries=check.max_retries,
        max_wait_s=max(check.max_wait_time_ms, 10) / 1000,
        initial_delay_s=check.initial_delay_ms / 1000,
        probe_during_initial_delay=check.probe_during_initial_delay,
    )


def _action(action: fleet_pb2.PreStartAction) -> dict[str, Any]:
    kind = action.WhichOneof("action")
    if kind is None:
        raise StartFailed("a pre-start action says nothing to do", "ACTION_FAILED")
    content = getattr(action, kind)
    fields: dict[str, Any] = {field.name: getattr(content, field.name) for field in content.DESCRIPTOR.fields}
    if kind == "run_command":
        fields["command"] = list(fields["command"])
    return {"kind": kind, "ref": action.ref, **fields}


def _remove_folder(folder: Path) -> None:
    def grant(function: Callable[..., Any], path: str, error: Any) -> None:
        # A session may have taken away its own rights on folders below its home.
        os.chmod(os.path.dirname(path), 0o700)
        function(path)

    # The spec goes last: as long as it stands, the next agent takes the kernel up.
    for below in folder.iterdir():
        if below.name == "spec.pb":
            continue
        if below.is_dir() and not below.is_symlink():
            shutil.rmtree(below, onerror=grant)
        else:
            below.unlink()
    shutil.rmtree(folder, onerror=grant)
