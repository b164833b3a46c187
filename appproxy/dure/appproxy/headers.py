"""What of a head is passed on, both ways, and what the proxy puts in (RFC 9110, sections 7.6 and 7.8)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dure.appproxy.response import Head, Headers

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
# Set by the proxy alone. `_` is compared as `-`: to a WSGI or CGI application they are one name.
_OURS = frozenset((b"x-forwarded-proto", b"x-forwarded-host", b"x-request-id", b"traceparent"))
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:+/=@-]{1,128}")
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Edge:
    """What the proxy knows of a request beside its head."""

    client_ip: str
    scheme: str
    request_id: str
    traceparent: str


def request_id_of(headers: Sequence[tuple[bytes, bytes]], made: str) -> str:
    """The client's request id if it sent one sane one, else `made`."""
    found = [value for name, value in headers if name.lower() == b"x-request-id"]
    if len(found) == 1 and _REQUEST_ID.fullmatch(found[0]):
        return found[0].decode("ascii")
    return made


def traceparent_of(headers: Sequence[tuple[bytes, bytes]], made: str) -> str:
    """The client's trace context if it sent one valid one, else `made`."""
    found = [value for name, value in headers if name.lower() == b"traceparent"]
    if len(found) == 1 and _TRACEPARENT.fullmatch(found[0]):
        return found[0].decode("ascii")
    return made


def request_head(
    method: str,
    target: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    edge: Edge,
    *,
    drop_authorization: bool,
    body_length: int | None,
    chunked: bool,
    upgrade: bool,
    default_host: str,
) -> bytes:
    """The head as it goes to the replica, in the client's order and spelling, duplicates kept.

    The body's framing is stated anew: `body_length`, or `chunked`, or neither for no body.
    """
    named = _named_in_connection(headers)
    lines = [method.encode("ascii") + b" " + target + b" HTTP/1.1"]
    forwarded_for: list[bytes] = []
    host = b""
    for name, value in headers:
        lowered = name.lower()
        plain = lowered.replace(b"_", b"-")
        if plain == b"x-forwarded-for":
            forwarded_for.append(value)
            continue
        if lowered == b"host":
            host = value
        if (
            plain in _OURS
            or lowered in _HOP_BY_HOP
            or lowered in named
            or lowered in (b"content-length", b"expect")
            or (plain == b"authorization" and drop_authorization)
        ):
            continue
        if lowered == b"tracestate" and not _keeps_trace(headers, edge):
            continue
        lines.append(name + b": " + value)
    if not host:
        host = default_host.encode("ascii")
        lines.append(b"Host: " + host)
    forwarded_for.append(edge.client_ip.encode("ascii"))
    lines.append(b"X-Forwarded-For: " + b", ".join(forwarded_for))
    lines.append(b"X-Forwarded-Proto: " + edge.scheme.encode("ascii"))
    lines.append(b"X-Forwarded-Host: " + host)
    lines.append(b"X-Request-Id: " + edge.request_id.encode("ascii"))
    lines.append(b"traceparent: " + edge.traceparent.encode("ascii"))
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
    elif body_length is not None:
        lines.append(b"Content-Length: %d" % body_length)
    if upgrade:
        lines.append(b"Connection: Upgrade")
        lines.extend(b"Upgrade: " + value for name, value in headers if name.lower() == b"upgrade")
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def response_head(
    head: Head,
    *,
    request_id: str,
    chunked: bool,
    connection: bytes,
) -> bytes:
    """The head as it goes to the client; `connection` is the Connection header's value, b"" for none."""
    named = _named_in_connection(head.headers)
    lines = [b"HTTP/1.1 %d %s" % (head.status, head.reason)]
    has_request_id = False
    length_said = False
    for name, value in head.headers:
        lowered = name.lower()
        if lowered in _HOP_BY_HOP or (lowered in named and lowered != b"content-length"):
            continue
        if lowered == b"content-length":
            # The same number twice is allowed to come, but not to be passed on.
            if length_said:
                continue
            length_said = True
        has_request_id = has_request_id or lowered == b"x-request-id"
        lines.append(name + b": " + value)
    if not has_request_id and head.status >= 200:
        lines.append(b"X-Request-Id: " + request_id.encode("ascii"))
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
    if head.status == 101:
        lines.extend(b"Upgrade: " + value for name, value in head.headers if name.lower() == b"upgrade")
    if connection:
        lines.append(b"Connection: " + connection)
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def trailer_lines(trailers: Headers) -> bytes:
    """The end of a chunked body, with its trailers but for those that would frame or route a message."""
    forbidden = _HOP_BY_HOP | {b"content-length", b"host", b"authorization", b"set-cookie"}
    lines = [name + b": " + value + b"\r\n" for name, value in trailers if name.lower() not in forbidden]
    return b"0\r\n" + b"".join(lines) + b"\r\n"


def origin_form(raw_target: str) -> bytes | None:
    """The request target for a replica: as it came, less scheme and host of an absolute one.

    None if it is of another form.
    """
    target = raw_target.encode("utf-8", "surrogateescape")
    if target.startswith(b"/") or target == b"*":
        return target
    match = re.fullmatch(rb"[Hh][Tt][Tt][Pp][Ss]?://[^/?#]*(.*)", target, re.DOTALL)
    if match is None:
        return None
    rest = match[1]
    return rest if rest.startswith(b"/") else b"/" + rest


def _keeps_trace(headers: Sequence[tuple[bytes, bytes]], edge: Edge) -> bool:
    """Whether the request goes on in the trace that it came with: tracestate belongs to that."""
    trace_id = edge.traceparent[3:35].encode("ascii")
    return any(name.lower() == b"traceparent" and value[3:35] == trace_id for name, value in headers)


def _named_in_connection(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Headers that the sender declared to be for the next hop only; Host cannot be one."""
    named: set[bytes] = set()
    for name, value in headers:
        if name.lower() == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    return frozenset(named - {b"", b"close", b"keep-alive", b"host"})
