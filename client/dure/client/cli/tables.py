"""Tables for people: which columns a resource has, narrow and wide."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from dure.client.cli.output import enum_word
from dure.client.cli.text import (
    GAP,
    age,
    align,
    cells,
    clean,
    cut,
    duration_span,
    figure,
    milliseconds,
    moment,
)
from dure.client.notation import amount
from dure.v1.agent_pb2 import Agent
from dure.v1.endpoint_pb2 import Endpoint, Event, NodeExplanation, Replica, Revision
from dure.v1.folder_pb2 import File, Folder
from dure.v1.scaling_pb2 import EndpointMeasurements
from dure.v1.token_pb2 import Token
from dure.wire.quantities import human_bytes

_GOOD = {"HEALTHY", "ALIVE", "ACTIVE", "CURRENT"}
_BAD = {"BLOCKED", "UNHEALTHY", "FAILED", "LOST", "REVOKED"}
_CALM = {"STOPPED", "IDLE", "TERMINATED", "EXPIRED", "TERMINATING", "REPLACED"}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `status` is the column to colour."""

    header: Sequence[str]
    rows: list[Sequence[str]]
    status: int | None = None

    def lines(
        self, *, color: bool, width: int | None = None, widths: Sequence[int] | None = None
    ) -> list[str]:
        """The aligned text; with `width`, no line is longer. A last column that is empty is left out."""
        header, rows = self.header, self.rows
        if rows and not widths and not any(row[-1] for row in rows):
            header, rows = header[:-1], [row[:-1] for row in rows]
        result = []
        for number, line in enumerate(align(header, rows, widths)):
            used = sum(cells(cell) + len(GAP) for cell in line[:-1])
            if width is not None:
                line[-1] = cut(line[-1], max(width - used, 8))
            if color and number and self.status is not None:
                line[self.status] = paint(line[self.status])
            result.append(GAP.join(line).rstrip())
        return result


def show(table: Table, *, color: bool) -> None:
    """Prints it; on a terminal the last column is cut to what fits."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in table.lines(color=color, width=width):
        click.echo(line, color=color)


def paint(text: str) -> str:
    """A status word in its colour."""
    word = text.strip()
    color = (
        "green" if word in _GOOD else "red" if word in _BAD else "bright_black" if word in _CALM else "yellow"
    )
    return click.style(text, fg=color)


def status_word(message: Any, field: str = "status") -> str:
    return enum_word(message.DESCRIPTOR.fields_by_name[field].enum_type, getattr(message, field))


def last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def endpoints(
    items: Sequence[Endpoint],
    wide: bool = False,
    now: datetime | None = None,
    seen: Mapping[str, EndpointMeasurements] | None = None,
) -> Table:
    """With `seen`, what is measured by name, two columns more."""
    now = now or datetime.now(UTC)
    header = ["NAME", "STATUS", "READY", "REV", "SHARES", "ADDRESS", "AGE"]
    if wide:
        header += [*(["RPS", "P95"] if seen is not None else []), "MODEL", "RUNTIME", "PUBLIC", "GROUP"]
        header += ["SLOTS", "UID"]
    rows = []
    for item in items:
        row = [
            last(item.name),
            status_word(item),
            f"{item.ready_replicas}/{item.desired_replicas}",
            revision_text(item),
            share_text(slots_of(item)),
            item.address,
            age(item.create_time, now),
        ]
        if wide:
            slots = ",".join(f"{slot}={amount(slot, text)}" for slot, text in sorted(slots_of(item).items()))
            public = "yes" if item.open_to_public else "no"
            if seen is not None:
                one = seen.get(item.name)
                row += (
                    [figure(one.requests_per_second), milliseconds(one.latency_p95_ms)] if one else ["", ""]
                )
            row += [last(item.model), item.runtime, public, item.resource_group, slots, item.uid]
        row.append("" if row[1] == "HEALTHY" else item.status_reason)
        rows.append(row)
    return Table([*header, "REASON"], list(rows), status=1)


def slots_of(item: Endpoint) -> Mapping[str, str]:
    """What each kernel gets, as far as it is known."""
    return item.resolved.resource_slots or item.resource_slots


def share_text(slots: Mapping[str, str]) -> str:
    """What part of GPUs each kernel gets: `0.25`, or `2 GPU`."""
    if "cuda.device" in slots:
        return f"{slots['cuda.device']} GPU"
    return slots.get("cuda.shares", "")


def revision_text(item: Endpoint) -> str:
    """`3`, or `2->3 25%` while a rollout moves requests from one to the other."""
    if not item.HasField("rollout"):
        return str(item.revision)
    rollout = item.rollout
    return f"{rollout.from_revision or ''}->{rollout.to_revision} {rollout.weight}%"


def replicas(items: Sequence[Replica], wide: bool = False, now: datetime | None = None) -> Table:
    now = now or datetime.now(UTC)
    header = ["ID", "REV", "NODE", "SHARES", "STATUS", "PROBE", "AGE"]
    if wide:
        header += ["PID", "TARGET", "SESSION", "DEVICES", "ENFORCED", "PROFILE", "UID"]
    rows = []
    for item in items:
        row = [
            short_uid(item.uid),
            str(item.revision),
            nodes(item),
            shares(item),
            status_word(item),
            probe(item),
            age(item.create_time, now),
        ]
        if wide:
            devices = ",".join(f"{share.device}={share.amount}" for share in item.devices)
            row += [str(item.pid) if item.pid else "", item.target, item.session, devices]
            row += [item.enforcement, profile(item), item.uid]
        rows.append([*row, item.reason or item.probe.detail])
    return Table([*header, "REASON"], list(rows), status=4)


def profile(item: Replica) -> str:
    """What its containers may do: `default`, `strict`; empty before it has a place."""
    words = (status_word(kernel, "security_profile").lower() for kernel in item.kernels)
    return ",".join(dict.fromkeys(word for word in words if word != "unspecified"))


def nodes(item: Replica) -> str:
    """The agents of its kernels, main1's first."""
    names = [last(item.node), *(last(kernel.node) for kernel in item.kernels)]
    return ",".join(dict.fromkeys(name for name in names if name))


def kernels(items: Sequence[Replica]) -> Table:
    """The kernels of replicas that have several."""
    rows = []
    for item in items:
        for kernel in item.kernels:
            devices = ",".join(f"{share.device}={share.amount}" for share in kernel.devices)
            pid = str(kernel.pid) if kernel.pid else ""
            row = [short_uid(item.uid), kernel.host, last(kernel.node), devices, kernel.enforcement, pid]
            rows.append([*row, kernel.message])
    return Table(["REPLICA", "KERNEL", "NODE", "DEVICES", "ENFORCED", "PID", "MESSAGE"], list(rows))


def revisions(items: Sequence[Revision], wide: bool = False, now: datetime | None = None) -> Table:
    now = now or datetime.now(UTC)
    header = ["REV", "STATE", "AGE", "AUTHOR", *(["NAME"] if wide else []), "CHANGE"]
    rows = []
    for item in items:
        row = [str(item.number), status_word(item, "state"), age(item.create_time, now), item.author]
        change = (
            f"{item.change} ({item.reason})" if item.reason and item.change else item.change or item.reason
        )
        rows.append([*row, *([item.name] if wide else []), change])
    return Table(header, list(rows), status=1)


def explained(items: Sequence[NodeExplanation]) -> Table:
    rows = [[last(item.node), "yes" if item.fits else "no", item.reason] for item in items]
    return Table(["NODE", "FITS", "REASON"], list(rows))


def short_uid(uid: str) -> str:
    """The random end of a UUIDv7: its beginning is the time, and alike for all that were made together."""
    return uid.rsplit("-", 1)[-1]


def shares(replica: Replica) -> str:
    """`0.50`, or `2 GPU` for whole devices; empty without."""
    try:
        total = sum((Decimal(share.amount) for share in replica.devices), Decimal(0))
    except InvalidOperation:
        return "?"
    if not replica.devices:
        return ""
    return f"{total} GPU" if replica.devices[0].slot == "cuda.device" else f"{total}"


def probe(replica: Replica) -> str:
    """`200`, `503 (2 failed)`, `no answer (1 failed)`; empty before the first."""
    if not replica.HasField("probe"):
        return ""
    code, failures = replica.probe.status_code, replica.probe.consecutive_failures
    if not code and not failures:
        return "ok" if status_word(replica, "health") == "HEALTHY" else ""
    return (str(code) if code else "no answer") + (f" ({failures} failed)" if failures else "")


def events(items: Sequence[Event], now: datetime | None = None) -> Table:
    """Newest first, as they come."""
    now = now or datetime.now(UTC)
    rows = [
        [
            age(item.time, now),
            "warning" if item.warning else "",
            item.reason,
            short_uid(item.replica),
            item.message,
        ]
        for item in items
    ]
    return Table(["AGE", "TYPE", "REASON", "REPLICA", "MESSAGE"], list(rows))


def tokens(items: Sequence[Token], wide: bool = False, now: datetime | None = None) -> Table:
    now = now or datetime.now(UTC)
    header = ["ID", "STATUS", "EXPIRES", "AGE"] + (["NAME"] if wide else [])
    rows = []
    for item in items:
        row = [item.uid, status_word(item), moment(item.expire_time), age(item.create_time, now)]
        rows.append([*row, *([item.name] if wide else []), item.label])
    return Table([*header, "LABEL"], list(rows), status=1)


def folders(items: Sequence[Folder], wide: bool = False, now: datetime | None = None) -> Table:
    now = now or datetime.now(UTC)
    header = ["NAME", "USAGE", "FILES", "SIZE", "AGE"] + (["UID"] if wide else [])
    rows = []
    for item in items:
        usage = status_word(item, "usage").lower()
        row = [last(item.name), usage, str(item.file_count), human_bytes(item.size_bytes)]
        rows.append([*row, age(item.create_time, now), *([item.uid] if wide else [])])
    return Table(header, list(rows))


def files(items: Sequence[File]) -> Table:
    rows = [
        [f"{item.mode:04o}", human_bytes(item.size_bytes), moment(item.update_time), item.path]
        for item in items
    ]
    return Table(["MODE", "SIZE", "CHANGED", "PATH"], list(rows))


def agents(items: Sequence[Agent], wide: bool = False) -> Table:
    header = ["NAME", "STATUS", "GROUP", "CPU", "MEM", "SHARES", "SESSIONS", "HEARD"]
    if wide:
        header += ["GPUS", "ENFORCES", "ARCH", "ADDRESS", "VERSION", "BACKEND", "UID"]
    rows = []
    for item in items:
        amounts = {amount.slot: amount for amount in item.slots}
        row = [
            last(item.name),
            agent_word(item),
            item.resource_group,
            *(_used(amounts.get(slot)) for slot in ("cpu", "mem", "cuda.shares")),
            str(item.session_count),
            f"{duration_span(item.last_heard)} ago" if item.HasField("last_heard") else "",
        ]
        if wide:
            row += [
                gpus(item),
                ",".join(dict.fromkeys(d.enforcement for d in item.devices if d.enforcement)),
                item.architecture,
                item.advertise_address,
                item.version,
                item.backend,
                item.uid,
            ]
        rows.append([*row, "" if row[1] == "ALIVE" else item.status_reason])
    return Table([*header, "REASON"], list(rows), status=1)


def agent_word(item: Agent) -> str:
    """Its status; DRAINING for one that is there but gets no new sessions."""
    word = status_word(item)
    return "DRAINING" if item.draining and word == "ALIVE" else word


def gpus(agent: Agent) -> str:
    """`2 x NVIDIA A100`; simulated ones are called so."""
    counts: dict[str, int] = {}
    for device in agent.devices:
        word = "SIMULATED" if device.accelerator == "simulated" else clean(device.model)
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} x {word}" for word, count in counts.items())


def amount_text(slot: str, amount: str) -> str:
    if slot != "mem":
        return amount
    try:
        return human_bytes(int(Decimal(amount)))
    except (InvalidOperation, ValueError):
        return amount


def _used(amount: Any) -> str:
    if amount is None:
        return ""
    return f"{amount_text(amount.slot, amount.used or '0')}/{amount_text(amount.slot, amount.capacity)}"
