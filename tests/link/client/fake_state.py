"""What the fake manager keeps in memory, and what its services share."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from grpc_status import rpc_status

from dure.client.context import Context
from dure.v1 import admin_pb2, agent_pb2, endpoint_pb2, folder_pb2, registry_pb2, scaling_pb2, token_pb2
from dure.wire import names
from dure.wire.errors import DureError, Unauthenticated, to_status

KEY = "dure_key_of_the_fake_manager"
Answer = TypeVar("Answer")
STEP_S = 5.0


def refuses(method: Callable[..., Awaitable[Answer]]) -> Callable[..., Awaitable[Answer]]:
    """Turns our errors into gRPC's, and checks the key, as the manager does."""

    @functools.wraps(method)
    async def checked(self: Any, request: Any, context: Any) -> Answer:
        try:
            self.fake.authenticate(context)
            return await method(self, request, context)
        except DureError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
            raise AssertionError("abort raises") from error

    return checked


class FakeManager:
    """State, and handles that tests pull. Revisions count changes; `kept` is the oldest to resume from."""

    def __init__(self) -> None:
        self.endpoints: dict[str, endpoint_pb2.Endpoint] = {}
        self.events: dict[str, list[endpoint_pb2.Event]] = {}
        self.ended: dict[str, list[endpoint_pb2.Replica]] = {}
        self.revisions: dict[str, list[endpoint_pb2.Revision]] = {}
        self.validation: list[endpoint_pb2.ValidateEndpointResponse] = []
        self.validations: list[endpoint_pb2.ValidateEndpointRequest] = []
        self.sessions = 0  # of validations, that run now
        self.explanation = endpoint_pb2.ExplainEndpointResponse()
        self.before_update: list[Callable[[], None]] = []  # each done once, when an update comes
        self.updates: list[endpoint_pb2.UpdateEndpointRequest] = []
        self.requests: dict[str, str] = {}
        self.folders: dict[str, folder_pb2.Folder] = {}
        self.files: dict[str, dict[str, tuple[folder_pb2.File, bytes]]] = {}
        self.registries: dict[str, registry_pb2.Registry] = {}
        self.tokens: dict[str, token_pb2.Token] = {}
        self.agents: list[agent_pb2.Agent] = []
        self.rules: dict[str, dict[str, scaling_pb2.ScalingRule]] = {}
        self.rule_updates: list[list[str]] = []  # masks
        self.scaling = scaling_pb2.ExplainScalingResponse()
        self.measurements = scaling_pb2.GetMeasurementsResponse()
        self.cluster = admin_pb2.GetClusterResponse(version="0.1.0", route_revision_number=7)
        self.join_requests: list[admin_pb2.CreateJoinTokenRequest] = []
        self.log: list[tuple[int, str]] = []
        self.revision = 0
        self.kept = 0
        self.page_size_max = 1000
        self.calls: list[str] = []
        self.unavailable: list[str] = []  # methods whose next call is answered with UNAVAILABLE
        self.break_download_after: int | None = None
        self.watches: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()
        self._uids = itertools.count(1)
        self.address = ""
        self.context = Context("", "")

    def authenticate(self, context: Any) -> None:
        if dict(context.invocation_metadata()).get("authorization") != f"Bearer {KEY}":
            raise Unauthenticated("the API key is not known")

    def called(self, method: str) -> None:
        self.calls.append(method)
        if method in self.unavailable:
            self.unavailable.remove(method)
            raise Unavailable("try again")

    def uid(self) -> str:
        return f"01990000-0000-7000-8000-{next(self._uids):012x}"

    def touch(self, name: str) -> None:
        """Logs a change and wakes the watches."""
        self.revision += 1
        self.log.append((self.revision, name))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self) -> None:
        await self._changed.wait()

    def set(self, endpoint_id: str, status: str, *, ready: int | None = None, reason: str = "") -> None:
        """Moves an endpoint; HEALTHY and STOPPED get the replicas that belong to them."""
        endpoint = self.endpoints[names.endpoint("default", endpoint_id)]
        endpoint.status = endpoint_pb2.EndpointStatus.Value(f"ENDPOINT_STATUS_{status}")
        endpoint.status_reason = reason
        endpoint.ready_replicas = endpoint.desired_replicas if ready is None else ready
        if status in ("HEALTHY", "STOPPED"):
            endpoint.ClearField("rollout")
        del endpoint.replicas[:]
        for number in range(endpoint.desired_replicas):
            healthy = number < endpoint.ready_replicas
            uid = f"01990000-0000-7000-8000-0000000000{number:02x}"
            endpoint.replicas.add(
                name=f"{endpoint.name}/replicas/{uid}",
                uid=uid,
                revision=endpoint.revision,
                status=endpoint_pb2.REPLICA_STATUS_HEALTHY
                if healthy
                else endpoint_pb2.REPLICA_STATUS_DEGRADED,
                health=endpoint_pb2.HEALTH_HEALTHY if healthy else endpoint_pb2.HEALTH_DEGRADED,
                node="agents/agent-1",
                devices=[endpoint_pb2.DeviceShare(device="SIM-0", slot="cuda.shares", amount="0.25")],
                target=f"127.0.0.1:{20000 + number}",
                pid=1000 + number,
                probe=endpoint_pb2.Probe(
                    status_code=200 if healthy else 503,
                    consecutive_failures=0 if healthy else 2,
                    detail="" if healthy else "status 503, expected 200",
                ),
            )
        self.touch(endpoint.name)

    def remove(self, endpoint_id: str) -> None:
        name = names.endpoint("default", endpoint_id)
        del self.endpoints[name]
        self.touch(name)

    def compact(self) -> None:
        """Forgets what happened: no watch can resume from before."""
        self.kept = self.revision + 1
        self.revision += 1

    async def drop_watches(self) -> None:
        """Breaks every watch as a dying manager does."""
        for watch in [*self.watches]:
            watch.cancel()
        await until(lambda: not self.watches)


class Unavailable(DureError):
    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "MANAGER_UNREACHABLE"


def page(items: Any, request: Any, fake: FakeManager) -> tuple[list[Any], str]:
    start = int(request.page_token or 0)
    end = start + min(request.page_size or 100, fake.page_size_max)
    return list(items)[start:end], str(end) if end < len(items) else ""


async def until(condition: Callable[[], object], within_s: float = STEP_S) -> None:
    """Waits for a condition; fails loudly when it does not come true."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)
