"""Counts every call of the API, times those of one request and one answer, and traces them if asked to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from dure.wire.prometheus import Counter, Histograms
from dure.wire.tracing import Tracing

_CODES = {code.value[0]: code for code in grpc.StatusCode}
# Of the caller's metadata, what a trace goes on by.
_CARRIED = ("traceparent", "tracestate")


class Observer(grpc.aio.ServerInterceptor):
    """Outermost: it sees what callers get. Methods are those that exist, so that labels stay bounded."""

    def __init__(self, tracing: Tracing | None) -> None:
        self._tracing = tracing
        self.calls = Counter(("method", "code"))
        self.durations = Histograms(("method",))
        # Calls under way that last: watches, logs, agents, proxies.
        self.open: dict[str, int] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method).lstrip("/")
        streams = handler.request_streaming or handler.response_streaming
        inner = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary
        if not asyncio.iscoroutinefunction(inner):
            # Health's and reflection's streams are generators: nothing to learn from them.
            return handler  # type: ignore[no-any-return]

        async def observed(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began_s = time.monotonic()
            span = self._begin(method, context) if self._tracing is not None else None
            code = grpc.StatusCode.UNKNOWN
            if streams:
                self.open[method] = self.open.get(method, 0) + 1
            try:
                answer = await inner(request, context)
                code = _code(context)
                return answer
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except BaseException:
                # An abort: the status was set before.
                code = _code(context, grpc.StatusCode.UNKNOWN)
                raise
            finally:
                self.calls.add(method, code.name)
                if streams:
                    self.open[method] -= 1
                else:
                    self.durations.observe(time.monotonic() - began_s, method)
                if self._tracing is not None:
                    error = "" if code is grpc.StatusCode.OK else code.name
                    self._tracing.end(span, error, {"rpc.grpc.status_code": code.value[0]})

        factory: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return factory(  # type: ignore[no-any-return]
            observed,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _begin(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        assert self._tracing is not None
        metadata = context.invocation_metadata() or ()
        headers = {key: str(value) for key, value in metadata if key in _CARRIED}
        service, _, name = method.rpartition("/")
        described = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        return self._tracing.begin(method, "server", described, headers)


def _code(
    context: grpc.aio.ServicerContext[Any, Any], default: grpc.StatusCode = grpc.StatusCode.OK
) -> grpc.StatusCode:
    # grpc.aio gives a StatusCode, or its number, or 0 if none was set.
    found: Any = context.code()
    if isinstance(found, grpc.StatusCode):
        return found
    return _CODES.get(found, default) if found else default
