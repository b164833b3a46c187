"""Who may pass: token checks, waiting lines, and every error answer that the proxy gives.

`ANSWERS` is the one place that maps a code to a status.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dure.appproxy.table import Route
from dure.routing.v1 import routing_pb2 as pb
from dure.wire.tokens import Claims, TokenRefused, verify

TOKENS_MEMO_MAX = 10_000
_SCHEMES = ("backendai", "bearer")
_CHALLENGES = (("WWW-Authenticate", 'Bearer realm="dure"'), ("WWW-Authenticate", 'BackendAI realm="dure"'))
_HOW_TO_SEND = "send `Authorization: BackendAI <token>` or `Authorization: Bearer <token>`"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error answer. `headers` come on top of those of every answer; `close` ends the connection."""

    status: int
    code: str
    message: str
    headers: tuple[tuple[str, str], ...] = ()
    close: bool = False


# Code: status, default sentence, seconds of Retry-After (0: none).
ANSWERS: Mapping[str, tuple[int, str, int]] = {
    "bad_request": (400, "the request is not well-formed HTTP/1.1", 0),
    "token_missing": (401, f"this endpoint needs a token: {_HOW_TO_SEND}", 0),
    "token_scheme": (401, f"the Authorization header has an unknown scheme: {_HOW_TO_SEND}", 0),
    "token_malformed": (401, "the token is not one of Dure's: copy it whole, or issue a new one", 0),
    "token_bad_signature": (401, "the token's signature does not match: issue a new one", 0),
    "token_expired": (401, "the token has expired: issue a new one", 0),
    "token_revoked": (401, "the token was revoked: issue a new one", 0),
    "token_other_endpoint": (403, "the token belongs to another endpoint", 0),
    "no_such_endpoint": (404, "no endpoint has this address", 0),
    "method_not_allowed": (405, "this method cannot be forwarded", 0),
    "request_timeout": (408, "the request's body did not arrive in time", 0),
    "body_too_large": (413, "the request's body is larger than this proxy takes", 0),
    "queue_full": (429, "too many requests wait for this endpoint already", 1),
    "head_too_large": (431, "the request's head is larger than this proxy takes", 0),
    "internal": (500, "the proxy failed; its log says more under this request id", 0),
    "upstream_unreachable": (502, "no replica of this endpoint accepts connections", 0),
    "upstream_closed": (502, "the replica closed the connection before it answered", 0),
    "upstream_invalid": (502, "the replica's answer is not well-formed HTTP/1.1", 0),
    "starting": (503, "the endpoint's replicas are starting", 5),
    "unhealthy": (503, "none of the endpoint's replicas is healthy", 5),
    "blocked": (503, "the endpoint failed too often and waits for its owner", 60),
    "stopped": (503, "the endpoint is stopped: its owner wants zero replicas", 60),
    "terminating": (503, "the endpoint is being removed", 60),
    "hold_full": (503, "too many requests wait for this endpoint to start", 5),
    "queue_timeout": (503, "the request waited too long for a free replica", 1),
    "upstream_timeout": (504, "the replica did not begin to answer in time", 0),
}
_UNAVAILABLE: Mapping[int, str] = {
    pb.UNAVAILABILITY_STARTING: "starting",
    # The manager always asks for requests to be held then: this is one that knows better by now.
    pb.UNAVAILABILITY_IDLE: "starting",
    pb.UNAVAILABILITY_UNHEALTHY: "unhealthy",
    pb.UNAVAILABILITY_BLOCKED: "blocked",
    pb.UNAVAILABILITY_STOPPED: "stopped",
    pb.UNAVAILABILITY_TERMINATING: "terminating",
}


def refusal(code: str, message: str = "", *, close: bool = False) -> Refusal:
    """The answer of a code that stands in `ANSWERS`."""
    status, sentence, retry_after_s = ANSWERS[code]
    headers: tuple[tuple[str, str], ...] = ()
    if status == 401:
        headers = _CHALLENGES
    elif retry_after_s:
        headers = (("Retry-After", str(retry_after_s)),)
    return Refusal(status, code, message or sentence, headers, close)


def unavailable(route: Route) -> Refusal:
    """The answer while nothing serves an endpoint.

    A table that gives no reason was made just before a replica drained: another one is starting.
    """
    return refusal(_UNAVAILABLE.get(route.unavailability, "starting"), route.unavailability_detail)


class Grant(enum.Enum):
    """How a request that may pass got in: with a token of ours, which is not forwarded, or without."""

    OPEN = enum.auto()
    TOKEN = enum.auto()


class TokenCheck:
    """Checks tokens against the table's keys, and remembers the signatures that it has verified.

    Only form and signature are remembered; time, audience and revocation are looked at every time.
    """

    def __init__(self) -> None:
        self._raw_keys: dict[str, bytes] = {}
        self._keys: dict[str, Ed25519PublicKey] = {}
        self._memo: OrderedDict[str, Claims] = OrderedDict()

    def use_keys(self, keys: Mapping[str, bytes]) -> None:
        """Takes over the table's keys. What a dropped key has signed is forgotten."""
        if dict(keys) == self._raw_keys:
            return
        self._raw_keys = dict(keys)
        self._keys = {key_id: Ed25519PublicKey.from_public_bytes(raw) for key_id, raw in keys.items()}
        self._memo.clear()

    def check(self, route: Route, authorization: Sequence[str], now_s: float) -> Grant | Refusal:
        """Whether a request with these Authorization headers may pass. `now_s` is Unix time."""
        if route.open_to_public:
            return Grant.TOKEN if any(self._looks_like_ours(value) for value in authorization) else Grant.OPEN
        if not authorization:
            return refusal("token_missing")
        if len(authorization) > 1:
            return refusal("token_malformed", "the request has more than one Authorization header: send one")
        scheme, _, token = authorization[0].strip().partition(" ")
        if scheme.lower() not in _SCHEMES:
            return refusal("token_scheme")
        try:
            claims = self._claims(token.strip())
        except TokenRefused as refused:
            return refusal("token_malformed" if refused.code == "malformed" else "token_bad_signature")
        if now_s >= claims.expires_at:
            return refusal("token_expired")
        if claims.endpoint_uid != route.endpoint_uid:
            return refusal("token_other_endpoint")
        if claims.uid in route.revoked_tokens:
            return refusal("token_revoked")
        return Grant.TOKEN

    def _claims(self, token: str) -> Claims:
        claims = self._memo.get(token)
        if claims is not None:
            self._memo.move_to_end(token)
            return claims
        try:
            claims = verify(token, self._keys)
        except OverflowError as error:  # `exp: Infinity` is valid to json and has no integer
            raise TokenRefused("malformed") from error
        self._memo[token] = claims
        if len(self._memo) > TOKENS_MEMO_MAX:
            self._memo.popitem(last=False)
        return claims

    def _looks_like_ours(self, authorization: str) -> bool:
        """A public endpoint's model may have keys of its own, but must not see tokens of Dure's."""
        scheme, _, token = authorization.strip().partition(" ")
        if scheme.lower() == "backendai":
            return True
        if scheme.lower() != "bearer":
            return False
        try:
            self._claims(token.strip())
        except TokenRefused as refused:
            return refused.code != "malformed"
        return True


class WaitingLine:
    """Tickets of requests that wait for a free replica, first come first served, bounded."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._tickets: OrderedDict[int, None] = OrderedDict()
        self._last = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def join(self) -> int | None:
        """A ticket, or None if the line is full."""
        if len(self._tickets) >= self._size_max:
            return None
        self._last += 1
        self._tickets[self._last] = None
        return self._last

    def first(self) -> int | None:
        return next(iter(self._tickets), None)

    def leave(self, ticket: int) -> None:
        """Takes a ticket out; one that has left before is no error."""
        self._tickets.pop(ticket, None)

    def tickets(self) -> list[int]:
        return list(self._tickets)
