"""A receiver of OpenTelemetry traces: a real OTLP gRPC server that keeps the spans that it gets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """As received; ids in hexadecimal, an empty parent for a root."""

    program: str
    name: str
    trace: str
    id: str
    parent: str
    failed: bool
    message: str
    attributes: dict[str, Any]


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """`environ` points a program to it."""

    environ: dict[str, str] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            program = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Span(
                            program,
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.status.code == 2,
                            span.status.message,
                            _values(span.attributes),
                        )
                    )
        self.arrived.set()
        return trace_service_pb2.ExportTraceServiceResponse()

    async def span(self, wanted: Callable[[Span], bool], limit_s: float = 15) -> Span:
        async with asyncio.timeout(limit_s):
            while True:
                self.arrived.clear()
                for span in self.spans:
                    if wanted(span):
                        return span
                await self.arrived.wait()


@contextlib.asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(found, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    found.environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        # Batches go out at once, not after 5 s.
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    try:
        yield found
    finally:
        await server.stop(0)


def _values(attributes: Any) -> dict[str, Any]:
    return {
        attribute.key: getattr(attribute.value, attribute.value.WhichOneof("value"))
        for attribute in attributes
    }
