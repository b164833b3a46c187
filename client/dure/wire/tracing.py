"""OpenTelemetry traces, for whoever asks for them: OTEL_EXPORTER_OTLP_ENDPOINT is set, and the packages of
the extra `otel` are there. Else there is no Tracing, and nothing of it is imported.

Spans go out in batches, by OTLP over gRPC, from a thread of the SDK with a bounded queue: a collector that is
away costs spans, never requests. Its other settings are those of the SDK (OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS ...).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any, Literal

from dure.wire import VERSION

FLUSH_LIMIT_S = 1.0
_log = logging.getLogger(__name__)

Kind = Literal["server", "client", "internal"]


class Tracing:
    """Makes spans. Made by `set_up`."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._trace = trace
        self._tracer = provider.get_tracer("dure", VERSION)
        self._propagator = TraceContextTextMapPropagator()
        self._kinds = {
            "server": trace.SpanKind.SERVER,
            "client": trace.SpanKind.CLIENT,
            "internal": trace.SpanKind.INTERNAL,
        }

    def begin(
        self, name: str, kind: Kind, attributes: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> Any:
        """A span that `end` ends. `headers` (lower-case) may hold the caller's traceparent and tracestate;
        without, or with nonsense in them, a trace begins."""
        parent = self._propagator.extract(headers or {})
        return self._tracer.start_span(
            name, context=parent, kind=self._kinds[kind], attributes=dict(attributes)
        )

    def headers(self, span: Any) -> dict[str, str]:
        """traceparent, and tracestate if there is one, for whoever is called next."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=self._trace.set_span_in_context(span))
        return carrier

    def end(self, span: Any, error: str = "", attributes: Mapping[str, Any] | None = None) -> None:
        """`error` marks it as failed, and says why."""
        if attributes:
            span.set_attributes(dict(attributes))
        if error:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, error))
        span.end()

    async def close(self) -> None:
        """Sends what waits, for a bounded time."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.force_flush()
            # The loop may be closed when it comes back at last.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(sent.set)

        # A daemon: with a collector that is away the SDK goes on trying, and the end must not wait for it.
        threading.Thread(target=flush, name="traces", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_LIMIT_S):
                await sent.wait()


def set_up(program: str, instance: str) -> Tracing | None:
    """None unless traces are asked for and can be made. Call once, at the start of a program."""
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but there are no traces: OpenTelemetry is not installed; "
            "install it with: pip install 'dure[otel]'"
        )
        return None
    described = {"service.version": VERSION, "service.instance.id": instance}
    # A name that the operator gave wins.
    if not os.environ.get("OTEL_SERVICE_NAME"):
        described["service.name"] = f"dure-{program}"
    provider = TracerProvider(resource=Resource.create(described), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _log.info("traces go to %s", os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"])
    return Tracing(provider)
