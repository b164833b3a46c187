"""What a kernel needs before its start: folders, a port, its place in a session, what keeps it to its
devices."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dure.agent import clusters, devices, environment, machine, numa
from dure.agent.backends.base import ClusterFiles, Container, ExtraMount, Handle, Injection, Plan, StartFailed
from dure.agent.node import Node
from dure.fleet.v1 import fleet_pb2
from dure.wire.backoff import backoff_s
from dure.wire.errors import DureError, ManagerUnreachable, TimedOut


class Preparation:
    """Of one kernel. `say` tells people what goes on."""

    def __init__(
        self, node: Node, spec: fleet_pb2.KernelSpec, handle: Handle, say: Callable[[str], None]
    ) -> None:
        self.spec = spec
        self.handle = handle
        self._node = node
        self._say = say

    async def plan(self, others: Iterable[Sequence[fleet_pb2.DeviceGrant]]) -> Plan:
        """Makes everything ready; `others` are the grants of the node's other kernels. Raises StartFailed, or
        ports.NoPort."""
        self._refuse(others)
        model: Path | None = None
        if self.spec.model.folder_uid:
            self._say("getting the model folder")
            model = await self._node.folders.provide(self.spec.model, self.handle.folder)
        extra = [await self._extra_mount(mount) for mount in self.spec.extra_mounts]
        cluster = await self._join_cluster() if clusters.size(self.spec) > 1 else None
        port = self.spec.port
        if not self._own_network:
            # Several kernels on one host cannot all have the number; only main1 is reached by it.
            fixed = self.spec.fixed_port and clusters.is_probed(self.spec)
            port = await self._node.leases.lease(self.handle.folder, self.spec.port if fixed else 0)
        injection = await self._node.modes.prepare(self.spec, self.handle)
        return self._plan(model, tuple(extra), cluster, port, injection)

    def _refuse(self, others: Iterable[Sequence[fleet_pb2.DeviceGrant]]) -> None:
        """Raises StartFailed for what this node must not, or cannot, run."""
        refusal = devices.refusal(self.spec.devices, self._node.devices, others)
        if refusal:
            raise StartFailed(refusal)
        strict = self.spec.security_profile == fleet_pb2.SECURITY_PROFILE_STRICT
        if strict and not self._node.backend.contains:
            raise StartFailed(
                "this node runs sessions without containers, and cannot keep one to the security profile "
                "`strict`: choose a resource group whose agents run images"
            )

    @property
    def _own_network(self) -> bool:
        """Whether it has a network of its own, or of its session's own."""
        alone = clusters.size(self.spec) == 1
        return self._node.backend.contains and (alone or clusters.own_network(self.spec.cluster))

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
            stop_grace_s=self.spec.stop_grace_ms / 1000,
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


def _action(action: fleet_pb2.PreStartAction) -> dict[str, Any]:
    kind = action.WhichOneof("action")
    if kind is None:
        raise StartFailed("a pre-start action says nothing to do", "ACTION_FAILED")
    content = getattr(action, kind)
    fields: dict[str, Any] = {field.name: getattr(content, field.name) for field in content.DESCRIPTOR.fields}
    if kind == "run_command":
        fields["command"] = list(fields["command"])
    return {"kind": kind, "ref": action.ref, **fields}
