"""One endpoint in full, for people: what was asked for, what it came to, how it is, what happened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

from dure.client.cli import tables
from dure.client.cli.describe import facts, section
from dure.client.cli.text import clean, figure, milliseconds, moment
from dure.client.manifest import to_manifest
from dure.client.notation import amount, command_text, mount_source, mount_target, steps_text
from dure.client.pulls import sentence
from dure.client.waiting import rollout_summary
from dure.v1.endpoint_pb2 import Endpoint, Event, Replica
from dure.v1.scaling_pb2 import EndpointMeasurements
from dure.wire.quantities import MEM

EVENTS_SHOWN = 10


def endpoint(
    item: Endpoint, events: Sequence[Event], *, color: bool, seen: EndpointMeasurements | None = None
) -> None:
    """Sections in the order in which one asks: is it well, how is it called, what is it, what happened."""
    status = tables.status_word(item)
    facts(
        [
            ("Name", item.name),
            ("Status", tables.paint(status) if color else status),
            ("Reason", item.status_reason),
            ("Replicas", _count(item)),
            ("Traffic", _traffic(seen)),
            ("Revision", _revision(item)),
            ("Created", moment(item.create_time)),
            ("Changed", moment(item.update_time)),
            ("UID", item.uid),
        ],
        color=color,
    )
    click.echo("\nAddress")
    for line in _address(item):
        click.echo(f"  {line}")
    if item.HasField("rollout"):
        section("Rollout", [clean(line) for line in rollout_lines(item)])
    section("Conditions", [f"{c.type}: {clean(c.message)}" for c in item.conditions])
    section("Errors in a row", [clean(error) for error in item.errors])
    click.echo("\nAsked for")
    facts(_asked(item), color=color, indent=2)
    if item.HasField("resolved"):
        click.echo("\nComes to")
        facts(resolved(item), color=color, indent=2)
    if item.replicas:
        click.echo("\nReplicas")
        tables.show(tables.replicas(item.replicas), color=color)
        section("Shares are kept by", enforced(item.replicas))
        several = [replica for replica in item.replicas if len(replica.kernels) > 1]
        if several:
            click.echo("\nKernels")
            tables.show(tables.kernels(several), color=color)
    section("Images", [clean(line) for line in image_lines(item)])
    if events:
        click.echo("\nNewest events" if len(events) >= EVENTS_SHOWN else "\nEvents")
        tables.show(tables.events(events), color=color)


def enforced(replicas: Iterable[Replica]) -> list[str]:
    """What keeps each within its parts of devices, as verified, and why it is no better."""
    lines = []
    for replica in replicas:
        if not replica.enforcement:
            continue
        why = next(
            (k.enforcement_detail for k in replica.kernels if k.enforcement == replica.enforcement), ""
        )
        lines.append(
            f"{tables.short_uid(replica.uid)}: {replica.enforcement}{f' ({clean(why)})' if why else ''}"
        )
    return lines


def resolved(item: Endpoint) -> list[tuple[str, str]]:
    """What request, preset, service definition and runtime came to."""
    result = item.resolved
    command = command_text(result.start_command)
    return [
        ("Command", command or "the image's own"),
        ("Port", str(result.port) if result.port else ""),
        ("Health check", result.health_check_path or "none: the port is enough"),
        ("Slots", _pairs({s: amount(s, text) for s, text in result.resource_slots.items()})),
        ("Image", " ".join(part for part in (result.image, result.architecture) if part)),
        ("Environment", _pairs(dict(result.environ))),
        ("Definition", result.model_definition_path),
    ]


def _traffic(seen: EndpointMeasurements | None) -> str:
    """Empty where nothing is measured."""
    if seen is None:
        return ""
    parts = [f"{figure(seen.requests_per_second)} requests/s", f"{figure(seen.concurrency)} under way"]
    parts += [f"{figure(seen.queue)} waiting"] if seen.queue else []
    parts += [f"p95 {milliseconds(seen.latency_p95_ms)}"] if seen.latency_p95_ms else []
    parts += [f"{figure(seen.error_rate * 100)}% errors"] if seen.error_rate else []
    return ", ".join(parts)


def _count(item: Endpoint) -> str:
    text = f"{item.ready_replicas} of {item.desired_replicas} ready"
    if item.desired_replicas != item.replica_count:
        text += f" ({item.replica_count} asked for)"
    return text


def _revision(item: Endpoint) -> str:
    text = str(item.revision)
    if item.stable_revision and item.stable_revision != item.revision:
        text += f" (the newest that was healthy: {item.stable_revision})"
    return text


def _address(item: Endpoint) -> list[str]:
    if not item.address:
        return ["none yet: no proxy has joined; `dure join-token create proxy` lets one join"]
    if item.open_to_public:
        return [item.address, f"open to public: curl {item.address}"]
    name = tables.last(item.name)
    return [
        item.address,
        f"TOKEN=$(dure token create {name} --expires 1h -q)",
        f'curl -H "Authorization: BackendAI $TOKEN" {item.address}',
    ]


def _asked(item: Endpoint) -> list[tuple[str, str]]:
    values = to_manifest(item)
    service, rollout = values.get("service", {}), dict(values.get("rollout", {}))
    if "steps" in rollout:
        rollout["steps"] = steps_text(list(item.rollout_policy.steps))
    check = service.get("health_check")
    at = item.model_mount_destination
    mounts = [
        f"{mount_source(m)} at {mount_target(m)}" + (" (writable)" if m.writable else "")
        for m in item.extra_mounts
    ]
    return [
        ("Model", tables.last(item.model) + (f" at {at}" if at else "")),
        ("Runtime", item.runtime),
        ("Definition", item.model_definition_path),
        ("Open to public", "yes" if item.open_to_public else "no: requests need a token"),
        ("Resource group", item.resource_group),
        ("Preset", item.preset),
        ("Slots", _pairs(values.get("resource_slots", {}))),
        ("Shared memory", amount(MEM, item.shared_memory)),
        ("Environment", _pairs(dict(item.environ))),
        ("Image", " ".join(part for part in (item.image, item.architecture) if part)),
        ("Pull policy", str(values.get("image_pull_policy", ""))),
        ("Profile", _profile(item)),
        ("Enforcement", f"{least} or better" if (least := item.require_enforcement) else ""),
        ("Mounts", ", ".join(mounts)),
        ("Cluster", _cluster(item)),
        ("Priority", str(values.get("priority", ""))),
        ("Command", command_text(item.service.start_command)),
        ("Port", str(service.get("port", ""))),
        ("Health check", "none" if check is False else _pairs(check or {})),
        ("Rollouts", _pairs(rollout)),
        ("To zero after", str(values.get("scale_to_zero_after", ""))),
        ("Metrics at", str(values.get("metrics_path", ""))),
    ]


def _cluster(item: Endpoint) -> str:
    if item.cluster_size <= 1:
        return ""
    where = to_manifest(item).get("cluster_mode", "single-node")
    return f"{item.cluster_size} kernels, {where}"


def _profile(item: Endpoint) -> str:
    """With what replicas have where their resource group holds them to more."""
    asked = tables.status_word(item, "security_profile").lower().replace("unspecified", "default")
    have = sorted({word for replica in item.replicas if (word := tables.profile(replica))} - {asked})
    return f"{asked}; replicas have {', '.join(have)}" if have else asked


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{key}={values[key]}" for key in sorted(values))


def image_lines(item: Endpoint) -> list[str]:
    """A line for each kernel whose image is being fetched."""
    return [
        f"{tables.short_uid(replica.uid)} {kernel.host} on {tables.last(kernel.node)}: "
        f"{sentence(kernel.pull)}"
        for replica in item.replicas
        for kernel in replica.kernels
        if kernel.HasField("pull")
    ]


def rollout_lines(item: Endpoint) -> list[str]:
    """Where it stands, and what one can do about it."""
    name = tables.last(item.name)
    lines = [f"{rollout_summary(item.rollout)}" + (f": {item.rollout.detail}" if item.rollout.detail else "")]
    if item.rollout.paused:
        lines.append(f"`dure endpoint rollout resume {name}` goes on, `dure endpoint rollback {name}` back")
    elif item.rollout.waits:
        lines.append(
            f"`dure endpoint rollout resume {name}` takes the next step, `promote` all that are left, "
            f"`dure endpoint rollback {name}` goes back"
        )
    return lines
