"""The fake manager's EndpointService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_status import rpc_status
from link.client.fake_revisions import Rollouts, canonical, masked, shape
from link.client.fake_state import FakeManager, page, refuses
from link.client.fake_trials import Trials

from dure.v1 import endpoint_pb2, endpoint_pb2_grpc
from dure.wire import names
from dure.wire.errors import (
    AlreadyExists,
    Compacted,
    Conflict,
    DureError,
    InvalidInput,
    NotFound,
    to_status,
)
from dure.wire.quantities import parse_slots


class Endpoints(Rollouts, Trials, endpoint_pb2_grpc.EndpointServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    def find(self, name: str) -> endpoint_pb2.Endpoint:
        _, endpoint_id = names.parse(name, "projects/{}/endpoints/{}")
        if name not in self.fake.endpoints:
            raise NotFound(f"there is no endpoint `{endpoint_id}`")
        return self.fake.endpoints[name]

    @refuses
    async def CreateEndpoint(self, request: Any, context: Any) -> endpoint_pb2.CreateEndpointResponse:
        fake = self.fake
        if request.request_id in fake.requests:
            stored = fake.endpoints[fake.requests[request.request_id]]
            fake.called("CreateEndpoint")
            return endpoint_pb2.CreateEndpointResponse(endpoint=stored)
        violations = []
        problem = names.check_id(request.endpoint_id, names.ENDPOINT_ID, "endpoint_id")
        if problem:
            violations.append(problem)
        try:
            parse_slots(request.endpoint.resource_slots, "endpoint.resource_slots")
        except InvalidInput as error:
            violations += error.violations
        if violations:
            raise InvalidInput.of(violations)
        if f"{request.parent}/folders/{request.endpoint.model}" not in fake.folders:
            raise NotFound(f"there is no folder `{request.endpoint.model}`")
        name = f"{request.parent}/endpoints/{request.endpoint_id}"
        if name in fake.endpoints:
            raise AlreadyExists(f"an endpoint `{request.endpoint_id}` exists already")
        endpoint = endpoint_pb2.Endpoint()
        endpoint.CopyFrom(request.endpoint)
        endpoint.name, endpoint.uid, endpoint.etag = name, fake.uid(), "1"
        canonical(endpoint, request.parent)
        endpoint.create_time.GetCurrentTime()
        endpoint.status = endpoint_pb2.ENDPOINT_STATUS_PENDING
        endpoint.status_reason = "waiting for a place"
        endpoint.address = "http://127.0.0.1:7100"
        endpoint.desired_replicas = endpoint.replica_count
        if request.validate_only:
            endpoint.revision = 1
            return endpoint_pb2.CreateEndpointResponse(endpoint=endpoint)
        self.revise(endpoint, "created")
        fake.endpoints[name] = endpoint
        fake.requests[request.request_id] = name
        fake.touch(name)
        # The answer is lost on the way when told so: what was stored stays.
        fake.called("CreateEndpoint")
        return endpoint_pb2.CreateEndpointResponse(endpoint=endpoint)

    @refuses
    async def GetEndpoint(self, request: Any, context: Any) -> endpoint_pb2.GetEndpointResponse:
        self.fake.called("GetEndpoint")
        return endpoint_pb2.GetEndpointResponse(endpoint=self.find(request.name))

    @refuses
    async def ListEndpoints(self, request: Any, context: Any) -> endpoint_pb2.ListEndpointsResponse:
        self.fake.called("ListEndpoints")
        items, token = page([self.fake.endpoints[n] for n in sorted(self.fake.endpoints)], request, self.fake)
        return endpoint_pb2.ListEndpointsResponse(endpoints=items, next_page_token=token)

    @refuses
    async def UpdateEndpoint(self, request: Any, context: Any) -> endpoint_pb2.UpdateEndpointResponse:
        self.fake.called("UpdateEndpoint")
        endpoint = self.find(request.endpoint.name)
        if self.fake.before_update:
            self.fake.before_update.pop()()
        if request.endpoint.etag and request.endpoint.etag != endpoint.etag:
            raise Conflict("the endpoint was changed meanwhile", reason="ETAG_MISMATCH")
        changed = masked(endpoint, request.endpoint, request.update_mask.paths)
        canonical(changed, endpoint.name.rsplit("/", 2)[0])
        shaped = shape(changed) != shape(endpoint)
        if request.validate_only:
            changed.revision += shaped
            return endpoint_pb2.UpdateEndpointResponse(endpoint=changed)
        self.fake.updates.append(request)
        if shaped:
            self.revise(changed, "changed")
        changed.desired_replicas = changed.replica_count
        changed.etag = str(int(endpoint.etag) + 1)
        endpoint.CopyFrom(changed)
        self.fake.touch(endpoint.name)
        return endpoint_pb2.UpdateEndpointResponse(endpoint=endpoint)

    @refuses
    async def DeleteEndpoint(self, request: Any, context: Any) -> endpoint_pb2.DeleteEndpointResponse:
        self.fake.called("DeleteEndpoint")
        endpoint = self.find(request.name)
        endpoint.status = endpoint_pb2.ENDPOINT_STATUS_TERMINATING
        self.fake.touch(endpoint.name)
        return endpoint_pb2.DeleteEndpointResponse(endpoint=endpoint)

    @refuses
    async def RetryEndpoint(self, request: Any, context: Any) -> endpoint_pb2.RetryEndpointResponse:
        self.fake.called("RetryEndpoint")
        endpoint = self.find(request.name)
        del endpoint.errors[:]
        endpoint.status = endpoint_pb2.ENDPOINT_STATUS_PENDING
        self.fake.touch(endpoint.name)
        return endpoint_pb2.RetryEndpointResponse(endpoint=endpoint)

    @refuses
    async def ListReplicas(self, request: Any, context: Any) -> endpoint_pb2.ListReplicasResponse:
        endpoint = self.find(request.parent)
        ended = self.fake.ended.get(endpoint.name, []) if request.show_ended else []
        items, token = page([*ended, *endpoint.replicas], request, self.fake)
        return endpoint_pb2.ListReplicasResponse(replicas=items, next_page_token=token)

    @refuses
    async def ListEvents(self, request: Any, context: Any) -> endpoint_pb2.ListEventsResponse:
        items, token = page(self.fake.events.get(self.find(request.parent).name, []), request, self.fake)
        return endpoint_pb2.ListEventsResponse(events=items, next_page_token=token)

    async def WatchEndpoints(self, request: Any, context: Any) -> AsyncIterator[Any]:
        fake = self.fake
        task = asyncio.current_task()
        assert task is not None
        fake.calls.append(f"WatchEndpoints {request.resume_after}")
        fake.watches.add(task)
        try:
            fake.authenticate(context)
            if request.name.count("/") > 1 and not request.resume_after:
                self.find(request.name)
            if request.resume_after and request.resume_after < fake.kept:
                raise Compacted("that revision is no longer kept")
            if request.resume_after:
                seen = request.resume_after
            else:
                seen = fake.revision
                chosen = [e for n, e in sorted(fake.endpoints.items()) if self._meant(request.name, n)]
                # In pieces, as a large snapshot comes.
                for endpoint in chosen[:-1]:
                    yield self._batch(request.name, seen, [endpoint.name], synced=False)
                yield self._batch(request.name, seen, [e.name for e in chosen[-1:]], synced=True)
            while True:
                news = {
                    name for revision, name in fake.log if revision > seen and self._meant(request.name, name)
                }
                if news:
                    seen = fake.revision
                    yield self._batch(request.name, seen, sorted(news), synced=True)
                else:
                    await fake.change()
        except DureError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
        except asyncio.CancelledError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
        finally:
            fake.watches.discard(task)

    def _meant(self, target: str, name: str) -> bool:
        return name == target or (target.count("/") == 1 and name.startswith(f"{target}/"))

    def _batch(self, target: str, revision: int, changed: list[str], *, synced: bool) -> Any:
        batch = endpoint_pb2.WatchEndpointsResponse(revision_number=revision, synced=synced)
        for name in changed:
            if name in self.fake.endpoints:
                batch.endpoints.add().CopyFrom(self.fake.endpoints[name])
                if target.count("/") == 1:
                    del batch.endpoints[-1].replicas[:]
            else:
                batch.removed.append(name)
        return batch
