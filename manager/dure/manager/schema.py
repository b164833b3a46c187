"""Tables of the store. Times are Unix milliseconds, amounts milli-units, uids UUIDv7 strings.

Names resolve to living rows only; everything else refers to uids.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, Index, Integer, LargeBinary, String, Text, false
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
    description: Mapped[str] = mapped_column(server_default="")
    # Slot to milli-units; what is left out has no limit. Of endpoints, 0 is no limit.
    quota_slots: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    quota_endpoints: Mapped[int] = mapped_column(server_default="0")


class User(Base):
    __tablename__ = "users"
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    admin: Mapped[bool] = mapped_column(Boolean)
    disabled: Mapped[bool] = mapped_column(Boolean)
    description: Mapped[str]
    created_ms: Mapped[int]


class Membership(Base):
    """What a user may do in a project: role `member` or `viewer`."""

    __tablename__ = "memberships"
    user_uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    project_uid: Mapped[str] = mapped_column(String(36), primary_key=True, index=True)
    role: Mapped[str] = mapped_column(String(16))


class ApiKey(Base):
    """A key of a user. `hash` is its SHA-256, `role` the most that it allows (`admin`: all its user may)."""

    __tablename__ = "api_keys"
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    user_uid: Mapped[str] = mapped_column(String(36), server_default="", index=True)
    label: Mapped[str] = mapped_column(server_default="")
    role: Mapped[str] = mapped_column(String(16))
    # Empty: good for all projects of its user.
    project_uid: Mapped[str] = mapped_column(String(36), server_default="")
    expires_ms: Mapped[int | None]
    created_ms: Mapped[int]


class AuditRecord(Base):
    """One call that changed something, or was refused. `project` is a name, empty for the cluster."""

    __tablename__ = "audit"
    __table_args__ = (Index("audit_project", "project", "uid"),)
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    time_ms: Mapped[int]
    actor: Mapped[str] = mapped_column(String(80))
    key_uid: Mapped[str] = mapped_column(String(36))
    project: Mapped[str] = mapped_column(String(64))
    method: Mapped[str] = mapped_column(String(64))
    resource: Mapped[str]
    detail: Mapped[str]
    outcome: Mapped[str] = mapped_column(String(32))
    peer: Mapped[str] = mapped_column(String(64))


class ResourceGroup(Base):
    """A set of agents. `policy` is SPREAD or PACK; `allowed_projects` has uids, empty for all projects;
    `security_profile` is the least of its kernels, DEFAULT or STRICT.

    A group that an agent names and nobody made appears by itself, open to all projects.
    """

    __tablename__ = "resource_groups"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    policy: Mapped[str] = mapped_column(String(16))
    allowed_projects: Mapped[list[Any]]
    proxy_group: Mapped[str] = mapped_column(String(64))
    description: Mapped[str]
    created_ms: Mapped[int]
    security_profile: Mapped[str] = mapped_column(String(16), server_default="DEFAULT")


class Preset(Base):
    """A named set of slots; `shared_memory` in bytes, 0 for the default."""

    __tablename__ = "presets"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    slots: Mapped[dict[str, Any]]
    shared_memory: Mapped[int]
    resource_group: Mapped[str] = mapped_column(String(64))
    description: Mapped[str]
    created_ms: Mapped[int]


class Image(Base):
    __tablename__ = "images"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    reference: Mapped[str]
    architecture: Mapped[str] = mapped_column(String(16))
    runtimes: Mapped[list[Any]]
    min_slots: Mapped[dict[str, Any]]
    description: Mapped[str]
    created_ms: Mapped[int]


class Runtime(Base):
    """A runtime variant; `content` is a serialised Runtime message."""

    __tablename__ = "runtimes"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    content: Mapped[bytes] = mapped_column(LargeBinary)
    builtin: Mapped[bool] = mapped_column(Boolean)
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
    # Gets nothing new, and what it has moves to others.
    draining: Mapped[bool] = mapped_column(Boolean, server_default=false())


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


class Registry(Base):
    """With what images of a registry are fetched for a project. `password` is sealed (see `sealing`)."""

    __tablename__ = "registries"
    project_uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    host: Mapped[str] = mapped_column(String(128), primary_key=True)
    username: Mapped[str]
    password: Mapped[bytes] = mapped_column(LargeBinary)
    created_ms: Mapped[int]
    updated_ms: Mapped[int]


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
    priority: Mapped[int] = mapped_column(server_default="10")
    rollout_policy: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    etag: Mapped[str] = mapped_column(String(36))
    # The wanted revision, the newest that was ever made, and the last of which all replicas were healthy
    # (0 for none). A rollback makes the wanted one smaller than the newest.
    revision: Mapped[int]
    newest_revision: Mapped[int] = mapped_column(server_default="1")
    stable_revision: Mapped[int] = mapped_column(server_default="0")
    # A try-out that belongs to a call of ValidateEndpoint: hidden, without an address, removed with the call.
    validation: Mapped[bool] = mapped_column(Boolean, server_default=false())
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
    evictions: Mapped[int] = mapped_column(server_default="0")
    evicted_ms: Mapped[int] = mapped_column(server_default="0")
    last_error: Mapped[str] = mapped_column(server_default="")
    # Who owns which number: `replica_count` is the user's, `desired_replicas` the manager's. `idle` says that
    # the autoscaler, not the user, went to zero, or that what it has woken is not up yet.
    idle: Mapped[bool] = mapped_column(Boolean, server_default=false())
    scale_to_zero_ms: Mapped[int] = mapped_column(server_default="0")
    metrics_path: Mapped[str] = mapped_column(server_default="/metrics")
    # Where the rollout of `revision` stands (see rollout.State); empty without one.
    rollout: Mapped[dict[str, Any]] = mapped_column(server_default="{}")


class ScalingRule(Base):
    """A rule; `step` is positive to add replicas. `threshold` is the user's decimal string."""

    __tablename__ = "scaling_rules"
    __table_args__ = (Index("scaling_rules_name", "endpoint_uid", "name", unique=True),)
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    endpoint_uid: Mapped[str] = mapped_column(String(36))
    name: Mapped[str] = mapped_column(String(64))
    source: Mapped[str] = mapped_column(String(24))
    metric: Mapped[str] = mapped_column(String(200))
    comparator: Mapped[str] = mapped_column(String(24))
    threshold: Mapped[str] = mapped_column(String(40))
    step: Mapped[int]
    min_replicas: Mapped[int]
    max_replicas: Mapped[int]
    cooldown_ms: Mapped[int]
    window_ms: Mapped[int]
    enabled: Mapped[bool] = mapped_column(Boolean)
    clamp: Mapped[bool] = mapped_column(Boolean)
    created_ms: Mapped[int]
    fired_ms: Mapped[int]


class ScalingDecision(Base):
    """A decision that changed something. `verdicts` has what each rule saw."""

    __tablename__ = "scaling_decisions"
    __table_args__ = (Index("scaling_decisions_endpoint", "endpoint_uid", "uid"),)
    uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    endpoint_uid: Mapped[str] = mapped_column(String(36))
    time_ms: Mapped[int]
    from_replicas: Mapped[int]
    to_replicas: Mapped[int]
    cause: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str]
    verdicts: Mapped[list[Any]]


class Revision(Base):
    """What shapes a replica, for ever, but for what became of it.

    `spec` is what was asked for and what it came to, `kernel` a KernelSpec template, `failed` why its
    rollout failed (empty if it did not).
    """

    __tablename__ = "revisions"
    endpoint_uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    created_ms: Mapped[int]
    folder_uid: Mapped[str] = mapped_column(String(36), index=True)
    spec: Mapped[dict[str, Any]]
    definition: Mapped[str]
    kernel: Mapped[bytes] = mapped_column(LargeBinary)
    author: Mapped[str] = mapped_column(String(64), server_default="")
    change: Mapped[str] = mapped_column(server_default="")
    failed: Mapped[str] = mapped_column(server_default="")


class RevisionFolder(Base):
    """Folders that replicas of a revision mount: its model folder and the extra mounts."""

    __tablename__ = "revision_folders"
    endpoint_uid: Mapped[str] = mapped_column(String(36), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    folder_uid: Mapped[str] = mapped_column(String(36), primary_key=True, index=True)


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
    # OpenSSH private key of a session of several kernels; empty otherwise.
    ssh_key: Mapped[str] = mapped_column(server_default="")


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
    # Whether it runs with the profile STRICT: as endpoint and resource group said when it was placed.
    strict: Mapped[bool] = mapped_column(Boolean, server_default=false())
    fixed_port: Mapped[int]
    rendezvous_port: Mapped[int] = mapped_column(server_default="0")
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
