"""The one error tree, and how it crosses gRPC.

    DureError
    ├── InvalidInput          INVALID_ARGUMENT     every violation at once
    ├── Unauthenticated       UNAUTHENTICATED
    ├── PermissionDenied      PERMISSION_DENIED
    ├── NotFound              NOT_FOUND
    ├── AlreadyExists         ALREADY_EXISTS
    ├── Conflict              ABORTED              an etag that is out of date, a stream taken over
    ├── FailedPrecondition    FAILED_PRECONDITION
    ├── ResourceExhausted     RESOURCE_EXHAUSTED
    ├── Compacted             OUT_OF_RANGE         a watch must start over
    ├── TimedOut              DEADLINE_EXCEEDED
    ├── ManagerUnreachable    UNAVAILABLE
    └── InternalError         INTERNAL             a bug: details are in the server's log

A server raises one of them and `server.abort_with` turns it into a `google.rpc.Status` with an ErrorInfo
(domain `dure`, the reason) and, for InvalidInput, a BadRequest. `from_rpc` turns that back into the
same class, so that users of the library catch these and never gRPC's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "dure"


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with an input: where (`resource_slots[cpu]`, `file:line: a.b`), and what."""

    field: str
    description: str


class DureError(Exception):
    """Base of all. `reason` is a stable upper-case word, `message` a sentence for people."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    exit_code: ClassVar[int] = 1
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason

    def __str__(self) -> str:
        return self.message


class InvalidInput(DureError):
    """What the caller asked for cannot be. `violations` lists everything that is wrong with it."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_INPUT"

    def __init__(
        self, message: str, *, violations: Iterable[Violation] = (), reason: str | None = None
    ) -> None:
        super().__init__(message, reason=reason)
        self.violations = tuple(violations)

    @classmethod
    def of(cls, violations: Sequence[Violation]) -> InvalidInput:
        """One error that says all of `violations` (at least one) in its message."""
        return cls("; ".join(f"{v.field}: {v.description}" for v in violations), violations=violations)


class Unauthenticated(DureError):
    """No key, or one that is not known."""

    code = grpc.StatusCode.UNAUTHENTICATED
    exit_code = 4
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(DureError):
    """The key is known but may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    exit_code = 4
    default_reason = "PERMISSION_DENIED"


class NotFound(DureError):
    """No such resource."""

    code = grpc.StatusCode.NOT_FOUND
    exit_code = 3
    default_reason = "NOT_FOUND"


class AlreadyExists(DureError):
    """The name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS
    exit_code = 5
    default_reason = "ALREADY_EXISTS"


class Conflict(DureError):
    """Somebody else was faster: read again and decide anew."""

    code = grpc.StatusCode.ABORTED
    exit_code = 5
    default_reason = "CONFLICT"


class FailedPrecondition(DureError):
    """The system is not in a state for this."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    exit_code = 5
    default_reason = "FAILED_PRECONDITION"


class ResourceExhausted(DureError):
    """A bound was reached: the port pool, a size limit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "RESOURCE_EXHAUSTED"


class Compacted(DureError):
    """The revision to resume after is no longer kept: start over with a snapshot."""

    code = grpc.StatusCode.OUT_OF_RANGE
    default_reason = "COMPACTED"


class TimedOut(DureError):
    """It took too long."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    exit_code = 6
    default_reason = "TIMED_OUT"


class ManagerUnreachable(DureError):
    """No manager answers at the address."""

    code = grpc.StatusCode.UNAVAILABLE
    exit_code = 7
    default_reason = "MANAGER_UNREACHABLE"


class InternalError(DureError):
    """A bug in a server; its log says more."""

    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


_BY_CODE: dict[grpc.StatusCode, type[DureError]] = {
    cls.code: cls
    for cls in (
        InvalidInput,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        Conflict,
        FailedPrecondition,
        ResourceExhausted,
        Compacted,
        TimedOut,
        ManagerUnreachable,
        InternalError,
    )
}

# A status travels in a header, and gRPC bounds those to 8 KiB by default: keep whole violations below it.
_VIOLATIONS_BYTES_MAX = 5_000


def to_status(error: DureError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error, bounded to what fits a gRPC trailer."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    packed = [_pack(details[0])]
    message = error.message
    if isinstance(error, InvalidInput) and error.violations:
        bad_request = error_details_pb2.BadRequest()
        size = 0
        for violation in error.violations:
            size += len(violation.field.encode()) + len(violation.description.encode())
            if size > _VIOLATIONS_BYTES_MAX:
                break
            bad_request.field_violations.add(field=violation.field, description=violation.description)
        left_out = len(error.violations) - len(bad_request.field_violations)
        if left_out:
            bad_request.field_violations.add(field="...", description=f"and {left_out} more")
        packed.append(_pack(bad_request))
        # The violations say it all: the same text twice would not fit.
        message = f"{len(error.violations)} error{'s' if len(error.violations) > 1 else ''} in the input"
    return status_pb2.Status(code=error.code.value[0], message=message[:1500], details=packed)


# What gRPC's client says of a stream that ended before it had sent its first message.
_BROKEN_STREAM = "Internal error from Core"


def from_rpc(error: grpc.RpcError) -> DureError:
    """The error that a server raised, or what stands for a broken connection."""
    assert isinstance(error, (grpc.Call, grpc.aio.AioRpcError))
    code = error.code()
    if code is grpc.StatusCode.INTERNAL and error.details() == _BROKEN_STREAM:
        code = grpc.StatusCode.UNAVAILABLE
    cls = _BY_CODE.get(code, DureError)
    message = error.details() or code.name
    reason: str | None = None
    violations: list[Violation] = []
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
    except ValueError:  # the trailer and the status disagree: a proxy in between made one up
        status = None
    for detail in status.details if status is not None else ():
        info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason = info.reason
        elif detail.Unpack(bad_request):
            violations = [Violation(v.field, v.description) for v in bad_request.field_violations]
    if cls is InvalidInput:
        invalid = InvalidInput.of(violations) if violations else InvalidInput(message)
        invalid.reason = reason or invalid.reason
        return invalid
    return cls(message, reason=reason)


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
