"""Who calls, and whether it may: every method but health and reflection needs a secret, of the kind that
its service takes, and what the table in `access` asks of its owner.

One interceptor authenticates, authorises, records, and turns errors into statuses, so that servicers raise
DureErrors and no stack trace leaves the manager. Secrets have 256 random bits and are looked up by their
SHA-256.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_status import rpc_status

from dure.manager import access, credentials
from dure.manager.access import Need, Principal, Rule
from dure.manager.audit import Entry, Trail
from dure.manager.store import Store, now_ms
from dure.wire import errors, tokens

log = logging.getLogger(__name__)

_OPEN_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
_MEMBER_SERVICES = {"dure.fleet.v1.FleetService": "agent", "dure.routing.v1.RoutingService": "proxy"}
# Wrong secrets are not remembered, right ones for a moment: the store would be asked for each call.
_CACHE_MS = 5_000
_CACHE_MAX = 10_000
# A stream that lasts is asked again whether its key still allows it; with the cache, it ends within 10 s.
RECHECK_S = 4.0
NOTES_MAX = 20


@dataclass
class Call:
    """The call that is being served. `project` and `resource` are for its record."""

    principal: Principal
    rule: Rule
    project: str = ""
    resource: str = ""
    notes: list[str] = field(default_factory=list)
    # Projects (uid to name) that were asked for and allowed; checked says that somebody looked.
    projects: dict[str, str] = field(default_factory=dict)
    checked: bool = False


_call: contextvars.ContextVar[Call] = contextvars.ContextVar("dure_call")


def current() -> Principal:
    """Who makes the call that is being served."""
    return _call.get().principal


def note(text: str) -> None:
    """Adds to what the audit trail says of this call. No secrets, no values of variables."""
    notes = _call.get().notes
    if len(notes) < NOTES_MAX:
        notes.append(text)


def enter(project_uid: str | None, project: str, resource: str = "") -> None:
    """Must be asked before a call uses a project: raises PermissionDenied unless its method's row in the
    table allows it. `project_uid` None stands for one that does not exist: no error for who may know."""
    call = _call.get()
    call.project, call.resource = call.project or project, call.resource or resource
    role = call.principal.role_in(project_uid or "")
    if not access.enough(role, call.rule.need):
        raise errors.PermissionDenied(access.refusal(project, role))
    call.checked = True
    if project_uid is not None:
        call.projects[project_uid] = project


def enter_user(user_uid: str | None, name: str) -> None:
    """The same for a user: everybody may see to their own, an administrator to all."""
    call = _call.get()
    if not call.principal.admin and user_uid != call.principal.user_uid:
        raise errors.PermissionDenied(
            f"`{name[:60]}` is not you, and only an administrator may see to other users; "
            "`dure user whoami` says who you are"
        )
    call.checked = True


def require_admin(what: str) -> None:
    """For methods that only a part of needs an administrator."""
    call = _call.get()
    if not call.principal.admin:
        raise errors.PermissionDenied(f"{what} takes an administrator's key")
    call.checked = True


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Authenticates and authorises each call, and maps what servicers raise."""

    def __init__(self, store: Store, trail: Trail) -> None:
        self._store = store
        self._trail = trail
        self._known: dict[tuple[str, str], tuple[int, Principal]] = {}
        self._generation = 0

    def forget(self) -> None:
        """After a change of users, keys or memberships: it binds at once, not when the cache runs out."""
        self._known.clear()
        self._generation += 1

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        service = method.split("/")[1] if method.count("/") == 2 else ""
        if handler is None or service in _OPEN_SERVICES:
            return handler
        if method in access.JOINS:
            kind, want = "join", access.JOINS[method]
            rule: Rule | None = Rule(Need.ANY, recorded=True)
        elif service in _MEMBER_SERVICES:
            kind, want, rule = _MEMBER_SERVICES[service], "", Rule(Need.ANY)
        else:
            # What has no row is for nobody: not even for an administrator, so that a test finds it.
            kind, want, rule = "user", "", access.RULES.get(method)
        return self._wrap(handler, method, kind, want, rule)

    def _wrap(
        self, handler: Any, method: str, kind: str, want: str, rule: Rule | None
    ) -> grpc.RpcMethodHandler[Any, Any]:
        # Streaming methods are written with context.read() and context.write(), so all four are coroutines.
        inner = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary
        lasts = kind == "user" and (handler.request_streaming or handler.response_streaming)

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            call: Call | None = None
            outcome: errors.DureError | str = "CANCELLED"
            try:
                principal = await self.authenticate(context.invocation_metadata() or (), kind, want)
                if rule is None:
                    raise errors.PermissionDenied("this method is open to nobody")
                call = Call(principal, rule)
                _call.set(call)
                if isinstance(request, Message):
                    _admit(call, request)
                elif rule.need is Need.ADMIN:
                    _admit_admin(call)
                if lasts:
                    answer = await self._watched(call, inner(request, context), context)
                else:
                    answer = await inner(request, context)
                if rule.need in (Need.READ, Need.WRITE, Need.SELF) and not call.checked:
                    raise AssertionError(f"{method} has checked no project and no user")
                outcome = "OK"
                return answer
            except errors.DureError as error:
                outcome = error
            except TimeoutError:
                outcome = errors.TimedOut("the manager is too busy; try again")
            except grpc.aio.AbortError:
                outcome = "ABORTED"
                raise
            except asyncio.CancelledError:
                raise
            except Exception:
                reference = secrets.token_hex(4)
                log.exception("%s failed (reference %s)", method, reference)
                outcome = errors.InternalError(
                    f"internal error; the manager's log has more under {reference}"
                )
            finally:
                if call is not None and call.rule.recorded:
                    self._record(call, method, request, outcome, context.peer())
            assert isinstance(outcome, errors.DureError)
            return await context.abort_with_status(rpc_status.to_status(errors.to_status(outcome)))

        factory: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        wrapped: grpc.RpcMethodHandler[Any, Any] = factory(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    async def _watched(self, call: Call, work: Awaitable[Any], context: Any) -> Any:
        """Serves a stream for as long as its key and the roles behind it last."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=RECHECK_S))[0]:
                call.principal = await self.authenticate(context.invocation_metadata() or (), "user")
                for uid, name in list(call.projects.items()):
                    enter(uid, name)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                # It is over either way; what it says to that is nobody's business any more.
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def _record(
        self, call: Call, method: str, request: Any, outcome: errors.DureError | str, peer: str
    ) -> None:
        if outcome == "OK" and getattr(request, "validate_only", False):
            return
        principal = call.principal
        resource, actor, detail = call.resource, principal.name, list(call.notes)
        if isinstance(request, Message):
            resource = access.resource_of(request) or resource
            if principal.kind == "join":
                resource = actor = f"{principal.role}/{getattr(request, principal.role)}"
            mask = getattr(request, "update_mask", None)
            if mask is not None and mask.paths and not detail:
                detail.append("changed " + ", ".join(mask.paths[:20]))
        if isinstance(outcome, errors.InvalidInput) and outcome.violations:
            # Their sentences quote what was found, which may be the value of a variable.
            detail.append("wrong: " + ", ".join(violation.field for violation in outcome.violations[:10]))
        elif isinstance(outcome, errors.DureError):
            detail.append(outcome.message)
        self._trail.record(
            Entry(
                actor=actor,
                key_uid=principal.uid,
                project=call.project or access.project_of(resource),
                method=method.rpartition("/")[2],
                resource=resource,
                detail="; ".join(detail),
                outcome=outcome.code.name if isinstance(outcome, errors.DureError) else outcome,
                peer=peer,
                merges=not isinstance(request, Message),
            )
        )

    async def authenticate(self, metadata: Any, kind: str, role: str = "") -> Principal:
        """Raises Unauthenticated; `role` is who a join token must let in."""
        header = next((str(value) for key, value in metadata if key == "authorization"), "")
        scheme, _, secret = header.partition(" ")
        if not secret or scheme.lower() != "bearer":
            raise errors.Unauthenticated(
                f"this call needs {credentials.WHAT[kind]} as `authorization: Bearer <secret>`",
                reason="NO_SECRET",
            )
        digest = tokens.hash_secret(secret.strip())
        now = now_ms()
        cached = self._known.get((kind, digest))
        if cached is not None and now < cached[0]:
            return cached[1]
        generation = self._generation
        async with self._store.read() as session:
            principal = await credentials.look_up(session, digest, kind, role, now)
        if kind == "join" or generation != self._generation:
            return principal
        if len(self._known) >= _CACHE_MAX:
            self._known.clear()
        ends_ms = now + _CACHE_MS
        if principal.expires_ms is not None:
            ends_ms = min(ends_ms, principal.expires_ms)
        self._known[kind, digest] = (ends_ms, principal)
        return principal


def _admit(call: Call, request: Message) -> None:
    """What the request alone shows: refused before anything else is said about it."""
    if call.rule.need is Need.ADMIN:
        _admit_admin(call)
    elif call.rule.need in (Need.READ, Need.WRITE) and not call.principal.admin:
        for project in sorted(access.projects_named(request)):
            role = call.principal.role_in_named(project)
            if not access.enough(role, call.rule.need):
                call.project = project
                raise errors.PermissionDenied(access.refusal(project, role))


def _admit_admin(call: Call) -> None:
    if not call.principal.admin:
        raise errors.PermissionDenied(
            "only an administrator may do this; `dure user whoami` says who you are, and whether your key "
            "allows less than you may do"
        )
