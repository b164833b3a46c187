"""Tables of the store. Times are Unix milliseconds, amounts milli-units, uids UUIDv7 strings.

Names resolve to living rows only; everything else refers to uids.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import BigInteger

# SQLite counts up only a column of exactly this type.
_Counter = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, int: BigInteger, str: Text}  # noqa: RUF012


class Change(Base):
    """The revision log: one row for every key that a transaction changed. `revision` only grows."""

    __tablename__ = "changes"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012
    revision: Mapped[int] = mapped_column(_Counter, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(16))
    uid: Mapped[str] = mapped_column(String(36))


class Meta(Base):
    """Facts about the store itself: `compacted` (revisions up to it are dropped)."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[str]


class Project(Base):
    __tablename__ = "projects"
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    created_ms: Mapped[int]


class ApiKey(Base):
    """Who may call the API. `hash` is the SHA-256 of the key."""

    __tablename__ = "api_keys"
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    user: Mapped[str] = mapped_column(String(64))
    role: Mapped[str] = mapped_column(String(16))
    created_ms: Mapped[int]


class JoinToken(Base):
    __tablename__ = "join_tokens"
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    expires_ms: Mapped[int]


class Agent(Base):
    """An agent that has joined. `hello` is the serialised Hello of its last connection, empty before one."""

    __tablename__ = "agents"
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    credential_hash: Mapped[str] = mapped_column(String(64), unique=True)
    resource_group: Mapped[str] = mapped_column(String(64))
    hello: Mapped[bytes] = mapped_column(LargeBinary)
    joined_ms: Mapped[int]


class Proxy(Base):
    """A proxy that has joined. `hello` as for agents, of `hello_ms`."""

    __tablename__ = "proxies"
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    credential_hash: Mapped[str] = mapped_column(String(64), unique=True)
    proxy_group: Mapped[str] = mapped_column(String(64))
    hello: Mapped[bytes] = mapped_column(LargeBinary)
    hello_ms: Mapped[int]
    joined_ms: Mapped[int]


class Folder(Base):
    __tablename__ = "folders"
    __table_args__ = (Index("folders_living", "project_uid", "name", unique=True),)
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    project_uid: Mapped[str] = mapped_column(String(36))
    name: Mapped[str] = mapped_column(String(64))
    usage: Mapped[str] = mapped_column(String(16))
    created_ms: Mapped[int]


class Endpoint(Base):
    """An endpoint. A row of a deleted one is kept with `deleted_ms`, and `living_name` empty (null)."""

    __tablename__ = "endpoints"
    __table_args__ = (
        Index("endpoints_living", "project_uid", "living_name", unique=True),
        Index("endpoints_request", "project_uid", "request_id", unique=True),
        Index("endpoints_port", "proxy_group", "port", unique=True),
    )
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    project_uid: Mapped[str] = mapped_column(String(36))
    name: Mapped[str] = mapped_column(String(64))
    living_name: Mapped[str | None] = mapped_column(String(64))
    request_id: Mapped[str | None] = mapped_column(String(128))
    created_ms: Mapped[int]
    updated_ms: Mapped[int]
    deleting: Mapped[bool] = mapped_column(Boolean, default=False)
    deleted_ms: Mapped[int | None]
    # What the user asked for and may change without a new revision.
    replica_count: Mapped[int]
    open_to_public: Mapped[bool] = mapped_column(Boolean)
    etag: Mapped[str] = mapped_column(String(36))
    revision: Mapped[int]
    # Its address: the port is null in subdomain mode, before a proxy has joined, and once released.
    proxy_group: Mapped[str] = mapped_column(String(64))
    port: Mapped[int | None]
    address: Mapped[str]
    # What the controller last decided.
    status: Mapped[str] = mapped_column(String(16))
    status_reason: Mapped[str]
    desired_replicas: Mapped[int]
    ready_replicas: Mapped[int]
    conditions: Mapped[list[Any]]
    blocked: Mapped[bool] = mapped_column(Boolean, default=False)
    errors: Mapped[list[Any]]
    failures: Mapped[int]
    failed_ms: Mapped[int]


class Revision(Base):
    """What shapes a replica, for ever. `spec` is what was asked for, `kernel` a KernelSpec template."""

    __tablename__ = "revisions"
    endpoint_uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    created_ms: Mapped[int]
    folder_uid: Mapped[str] = mapped_column(String(36), index=True)
    spec: Mapped[dict[str, Any]]
    definition: Mapped[str]
    kernel: Mapped[bytes] = mapped_column(LargeBinary)


class Replica(Base):
    __tablename__ = "replicas"
    __table_args__ = (Index("replicas_endpoint", "endpoint_uid", "ended_ms"),)
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    endpoint_uid: Mapped[str] = mapped_column(String(36))
    revision: Mapped[int]
    session_uid: Mapped[str] = mapped_column(String(36))
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str]
    created_ms: Mapped[int]
    since_ms: Mapped[int]
    was_healthy: Mapped[bool] = mapped_column(Boolean, default=False)
    healthy_since_ms: Mapped[int]
    draining: Mapped[bool] = mapped_column(Boolean, default=False)
    ended_ms: Mapped[int | None]


class Kernel(Base):
    """A kernel and what it holds of its agent. The grant counts until `phase` is GONE."""

    __tablename__ = "kernels"
    __table_args__ = (
        Index("kernels_replica", "replica_uid"),
        Index("kernels_agent", "agent_uid", "phase"),
        Index("kernels_phase", "phase"),
    )
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    replica_uid: Mapped[str] = mapped_column(String(36))
    endpoint_uid: Mapped[str] = mapped_column(String(36))
    session_uid: Mapped[str] = mapped_column(String(36))
    agent_uid: Mapped[str] = mapped_column(String(36))
    role: Mapped[str] = mapped_column(String(8))
    index: Mapped[int]
    generation: Mapped[int]
    wanted: Mapped[bool] = mapped_column(Boolean)
    slots: Mapped[dict[str, Any]]
    devices: Mapped[list[Any]]
    fixed_port: Mapped[int]
    phase: Mapped[str] = mapped_column(String(16))
    health: Mapped[str] = mapped_column(String(16))
    # The newest serialised KernelStatus, empty before the first.
    status: Mapped[bytes] = mapped_column(LargeBinary)


class Token(Base):
    """Claims of a token; its text is signed again when it is shown."""

    __tablename__ = "tokens"
    __table_args__ = (Index("tokens_endpoint", "endpoint_uid"),)
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    endpoint_uid: Mapped[str] = mapped_column(String(36))
    label: Mapped[str]
    key_id: Mapped[str] = mapped_column(String(64))
    issued_s: Mapped[int]
    expires_s: Mapped[int]
    revoked_ms: Mapped[int | None]


class Event(Base):
    __tablename__ = "events"
    __table_args__ = (Index("events_endpoint", "endpoint_uid", "uid"),)
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    endpoint_uid: Mapped[str] = mapped_column(String(36))
    replica_uid: Mapped[str] = mapped_column(String(36))
    time_ms: Mapped[int]
    reason: Mapped[str] = mapped_column(String(32))
    message: Mapped[str]
    warning: Mapped[bool] = mapped_column(Boolean)


class RestingPort(Base):
    """A port that was released and must not be given out again before `until_ms`."""

    __tablename__ = "resting_ports"
    proxy_group: Mapped[str] = mapped_column(String(64), primary_key=True)
    port: Mapped[int] = mapped_column(primary_key=True)
    until_ms: Mapped[int]
