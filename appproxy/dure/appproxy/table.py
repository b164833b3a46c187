"""The route table: what the proxy forwards by, at a revision number.

An `Assembler` takes the pieces of updates that the manager streams and yields a new, checked, immutable
`Table` when the last piece is there, never before: a stream that breaks in the middle changes nothing.
`dump` and `load` are its form on the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from dure.routing.v1 import routing_pb2 as pb

_MAGIC = b"DURE-TABLE-1\n"
_DIGEST_BYTES = 32
# A label is looked up in every request of subdomain mode; DNS allows no longer one.
_LABEL_LENGTH_MAX = 63
_POOL_WEIGHT_MAX = 100


class TableError(Exception):
    """An update, or a file, that cannot be a table. The message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A replica that takes traffic, or took it and drains."""

    replica_uid: str
    host: str
    port: int
    weight: int = 1
    draining: bool = False
    revision: int = 0


@dataclass(frozen=True, slots=True)
class TrafficPool:
    """The targets of one revision, and their share of the requests, 0 to 100."""

    revision: int
    weight: int


@dataclass(frozen=True, slots=True)
class Scraping:
    """Where replicas show their metrics, and the time between two looks at them."""

    path: str
    interval_ms: int


@dataclass(frozen=True, slots=True)
class Route:
    """How one endpoint is served. `unavailability` is the enum's number, see routing.proto."""

    endpoint_uid: str
    project: str
    endpoint: str
    port: int
    label: str
    open_to_public: bool
    targets: tuple[Target, ...]
    unavailability: int
    unavailability_detail: str
    revoked_tokens: frozenset[str]
    pools: tuple[TrafficPool, ...] = ()
    scraping: Scraping | None = None
    hold_ms: int = 0


@dataclass(frozen=True)
class Table:
    """All routes by endpoint uid, and the raw public keys by id. Build it with `make`.

    `members` are the proxies of the group that are connected; they are not kept on disk.
    """

    id: str
    revision_number: int
    routes: Mapping[str, Route]
    keys: Mapping[str, bytes]
    members: tuple[str, ...]
    _by_port: Mapping[int, Route] = field(repr=False, compare=False)
    _by_label: Mapping[str, Route] = field(repr=False, compare=False)

    def at_port(self, port: int) -> Route | None:
        return self._by_port.get(port)

    def at_label(self, label: str) -> Route | None:
        """By host label, in any case."""
        return self._by_label.get(label.lower())

    def ports(self) -> Mapping[int, Route]:
        return self._by_port


def scraper_of(members: Iterable[str], replica_uid: str) -> str:
    """The member that scrapes a replica, "" without members.

    Rendezvous hashing: all proxies agree without a word, and one that comes or goes moves only its own share.
    """
    return max(members, key=lambda member: (_rank(member, replica_uid), member), default="")


def _rank(member: str, replica_uid: str) -> bytes:
    return hashlib.blake2b(f"{member}\0{replica_uid}".encode(), digest_size=8).digest()


def make(
    table_id: str,
    revision_number: int,
    routes: Iterable[Route],
    keys: Mapping[str, bytes],
    members: Iterable[str] = (),
) -> Table:
    """A table, checked whole. Raises TableError if two endpoints share an address, or a value cannot be."""
    by_uid: dict[str, Route] = {}
    by_port: dict[int, Route] = {}
    by_label: dict[str, Route] = {}
    for route in routes:
        _check_route(route)
        if route.endpoint_uid in by_uid:
            raise TableError(f"endpoint {route.endpoint_uid} stands in the table twice")
        by_uid[route.endpoint_uid] = route
        if route.port and by_port.setdefault(route.port, route) is not route:
            other = by_port[route.port].endpoint_uid
            raise TableError(f"endpoints {other} and {route.endpoint_uid} share port {route.port}")
        label = route.label.lower()
        if label and by_label.setdefault(label, route) is not route:
            raise TableError(
                f"endpoints {by_label[label].endpoint_uid} and {route.endpoint_uid} share label {label}"
            )
    for key_id, key in keys.items():
        if not key_id or len(key) != 32:
            raise TableError(f"key `{key_id}` is not an Ed25519 public key of 32 bytes")
    return Table(table_id, revision_number, by_uid, dict(keys), tuple(members), by_port, by_label)


EMPTY = make("", 0, (), {})


class Assembler:
    """Holds the current table and the pieces of the update that is under way."""

    def __init__(self, table: Table = EMPTY) -> None:
        self.table = table
        self._pieces: list[pb.TableUpdate] = []

    def forget_pieces(self) -> None:
        """A new stream starts: what the old one had not finished will never be finished."""
        self._pieces = []

    def apply(self, update: pb.TableUpdate) -> Table | None:
        """The new table once its last piece is there, else None.

        Raises TableError, and keeps the table as it was, if the pieces make no sense.
        """
        if self._pieces and (
            self._pieces[0].snapshot != update.snapshot or self._pieces[0].table_id != update.table_id
        ):
            self._pieces = []
            raise TableError("an update began before the one before it was complete")
        self._pieces.append(update)
        if not update.complete:
            return None
        pieces, self._pieces = self._pieces, []
        self.table = _merge(self.table, pieces)
        return self.table


def _merge(table: Table, pieces: list[pb.TableUpdate]) -> Table:
    last = pieces[-1]
    if not last.table_id:
        raise TableError("an update without a table id")
    if last.snapshot:
        routes: dict[str, Route] = {}
        keys: dict[str, bytes] = {}
        members: tuple[str, ...] = ()
    else:
        if last.table_id != table.id:
            raise TableError(f"changes to table {last.table_id}, but this proxy has {table.id or 'none'}")
        if last.revision_number < table.revision_number:
            raise TableError(
                f"changes up to revision {last.revision_number}, but this proxy is at {table.revision_number}"
            )
        routes, keys, members = dict(table.routes), dict(table.keys), table.members
    new_keys: dict[str, bytes] = {}
    for piece in pieces:
        for uid in piece.removed:
            routes.pop(uid, None)
        for message in piece.routes:
            routes[message.endpoint_uid] = _route_of(message)
        new_keys.update({key.id: key.key for key in piece.keys})
        members = tuple(piece.members) or members
    return make(last.table_id, last.revision_number, routes.values(), new_keys or keys, members)


def dump(table: Table) -> bytes:
    """The table as a file: a magic line with the version, a SHA-256, a snapshot in one piece."""
    message = pb.TableUpdate(
        table_id=table.id, revision_number=table.revision_number, snapshot=True, complete=True
    )
    message.routes.extend(_message_of(route) for route in table.routes.values())
    message.keys.extend(pb.PublicKey(id=key_id, key=key) for key_id, key in table.keys.items())
    body = message.SerializeToString()
    return _MAGIC + hashlib.sha256(body).digest() + body


def load(content: bytes) -> Table:
    """The table of a file. Raises TableError if it is of another version, damaged or makes no sense."""
    if not content.startswith(_MAGIC):
        raise TableError("not a route table of this version")
    digest = content[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]
    body = content[len(_MAGIC) + _DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != digest:
        raise TableError("the checksum does not match: the file is damaged")
    try:
        message = pb.TableUpdate.FromString(body)
    except DecodeError as error:
        raise TableError(f"not a route table: {error}") from error
    return _merge(EMPTY, [message])


def _check_route(route: Route) -> None:
    where = f"endpoint {route.endpoint_uid or '(no uid)'}"
    if not route.endpoint_uid:
        raise TableError("a route without an endpoint uid")
    if not 0 <= route.port <= 65535:
        raise TableError(f"{where}: port {route.port} is not a port")
    if len(route.label) > _LABEL_LENGTH_MAX or "." in route.label:
        raise TableError(f"{where}: `{route.label[:80]}` is not a host label")
    seen: set[str] = set()
    for target in route.targets:
        if not target.replica_uid or target.replica_uid in seen:
            raise TableError(f"{where}: replica uid `{target.replica_uid}` is empty or stands twice")
        seen.add(target.replica_uid)
        if not target.host or not 0 < target.port <= 65535 or target.weight < 1:
            raise TableError(
                f"{where}: replica {target.replica_uid} has no usable address or weight "
                f"({target.host}:{target.port}, weight {target.weight})"
            )
    if len({pool.revision for pool in route.pools}) < len(route.pools):
        raise TableError(f"{where}: two pools have the same revision")
    for pool in route.pools:
        if not 0 <= pool.weight <= _POOL_WEIGHT_MAX:
            raise TableError(f"{where}: pool {pool.revision} has weight {pool.weight}, not 0 to 100")


def _route_of(message: pb.Route) -> Route:
    return Route(
        endpoint_uid=message.endpoint_uid,
        project=message.project,
        endpoint=message.endpoint,
        port=message.port,
        label=message.label,
        open_to_public=message.open_to_public,
        targets=tuple(
            Target(t.replica_uid, t.host, t.port, t.weight, t.draining, t.revision) for t in message.targets
        ),
        unavailability=message.unavailability,
        unavailability_detail=message.unavailability_detail,
        revoked_tokens=frozenset(message.revoked_tokens),
        pools=tuple(TrafficPool(pool.revision, pool.weight) for pool in message.pools),
        scraping=Scraping(message.scrape.path, message.scrape.interval_ms)
        if message.HasField("scrape")
        else None,
        hold_ms=message.hold_ms,
    )


def _message_of(route: Route) -> pb.Route:
    return pb.Route(
        endpoint_uid=route.endpoint_uid,
        project=route.project,
        endpoint=route.endpoint,
        port=route.port,
        label=route.label,
        open_to_public=route.open_to_public,
        targets=[_target_message_of(target) for target in route.targets],
        unavailability=pb.Unavailability.ValueType(route.unavailability),
        unavailability_detail=route.unavailability_detail,
        revoked_tokens=sorted(route.revoked_tokens),
        pools=[pb.Pool(revision=pool.revision, weight=pool.weight) for pool in route.pools],
        scrape=pb.ScrapeSettings(path=route.scraping.path, interval_ms=route.scraping.interval_ms)
        if route.scraping is not None
        else None,
        hold_ms=route.hold_ms,
    )


def _target_message_of(target: Target) -> pb.Target:
    return pb.Target(
        replica_uid=target.replica_uid,
        host=target.host,
        port=target.port,
        weight=target.weight,
        draining=target.draining,
        revision=target.revision,
    )
