"""The trace span of a forwarded request, when traces are asked for."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from dure.appproxy.admission import Refusal
from dure.appproxy.table import Route
from dure.wire.tracing import Tracing


def begin(
    tracing: Tracing, request: web.BaseRequest, route: Route, request_id: str, traceparent: str
) -> tuple[Any, str]:
    """A span within the client's trace, or else of a trace of its own; and the traceparent for the replica.

    `traceparent` is the client's if it sent a valid one.
    """
    attributes = {
        "http.request.method": request.method,
        "url.path": request.path,
        "dure.project": route.project,
        "dure.endpoint": route.endpoint,
        "dure.endpoint_uid": route.endpoint_uid,
        "dure.request_id": request_id,
    }
    given = {}
    if request.headers.get("traceparent") == traceparent:
        given = {"traceparent": traceparent, "tracestate": ",".join(request.headers.getall("tracestate", ()))}
    span = tracing.begin("forward", "server", attributes, given)
    return span, tracing.headers(span).get("traceparent", traceparent)


def end(tracing: Tracing, span: Any, replica_uid: str, status: int, refused: Refusal | None) -> None:
    """`status` is 0 if no whole answer got through; `refused` is the proxy's own answer."""
    error = ""
    if refused is not None:
        status = refused.status
        error = refused.code if status >= 500 else ""
    elif not status:
        error = "no whole answer got through"
    elif status >= 500:
        error = f"the replica answered with status {status}"
    attributes: dict[str, Any] = {}
    if status:
        attributes["http.response.status_code"] = status
    if replica_uid:
        attributes["dure.replica_uid"] = replica_uid
    tracing.end(span, error, attributes)
