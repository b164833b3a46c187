"""Brings an endpoint and its scaling rules to what a manifest says."""

from __future__ import annotations

from dataclasses import dataclass, field

from dure.client.client import Client
from dure.client.manifest import differs
from dure.client.manifest_reader import Manifest
from dure.client.rule_changes import RulePlan, plan_rules
from dure.client.wanted import EndpointFields
from dure.v1.endpoint_pb2 import Endpoint
from dure.v1.scaling_pb2 import ScalingRule
from dure.wire.errors import InvalidInput, NotFound, Violation


@dataclass(frozen=True)
class Applied:
    """`before` None: it was made. `after` of a dry run is what would be.

    `rules` is what changed in its scaling rules, `warnings` what looks wrong with them.
    """

    before: Endpoint | None
    after: Endpoint
    rules: RulePlan = field(default_factory=RulePlan)
    warnings: tuple[str, ...] = ()


async def apply_manifest(client: Client, manifest: Manifest, *, dry_run: bool = False) -> Applied:
    """Creates the endpoint, or updates it to exactly what the manifest says.

        for manifest in read_manifests(Path("chat.yaml").read_text(), "chat.yaml"):
            await apply_manifest(client, manifest)

    What a manifest leaves out goes back to its default, but for the number of replicas and the scaling rules,
    which stay. Raises Conflict when somebody else changes it at the same time: do it again.
    """
    before, after = await _apply_endpoint(client, manifest, dry_run)
    if manifest.rules is None:
        return Applied(before, after)
    current: list[ScalingRule] = []
    if before is not None:
        current = [rule async for rule in client.rules.list(manifest.name)]
    plan = plan_rules(current, manifest.rules)
    warnings = () if dry_run else await _apply_rules(client, manifest.name, plan)
    return Applied(before, after, plan, warnings)


async def _apply_rules(client: Client, endpoint: str, plan: RulePlan) -> tuple[str, ...]:
    """One call after the other: what is removed first, what is made last, in the order of the file."""
    warnings: list[str] = []
    for step in plan.steps:
        name = step.rule.name.rsplit("/", 1)[-1]
        if step.verb == "remove":
            await client.rules.remove(endpoint, name)
            continue
        if step.verb == "add":
            kept = await client.rules.put(endpoint, step.rule, name)
        else:
            kept = await client.rules.change(endpoint, name, step.rule, step.paths)
        warnings += [f"rule {name}: {warning}" for warning in kept.warnings]
    return tuple(warnings)


async def _apply_endpoint(
    client: Client, manifest: Manifest, dry_run: bool
) -> tuple[Endpoint | None, Endpoint]:
    """The endpoint before and after."""
    try:
        before = await client.endpoints.get(manifest.name)
    except NotFound:
        fields: EndpointFields = {**manifest.fields}
        fields["replicas"] = 1 if manifest.replicas is None else manifest.replicas
        after = await client.endpoints.create(manifest.name, model=manifest.model, dry_run=dry_run, **fields)
        return None, after
    current, wanted = (name.rsplit("/", 1)[-1] for name in (before.model, manifest.model))
    if current != wanted:
        raise InvalidInput.of(
            [
                Violation(
                    "model",
                    f"endpoint {manifest.name} serves folder `{current}`, not `{wanted}`, and keeps it: "
                    f"`dure endpoint delete {manifest.name} --wait` first, or use another name",
                )
            ]
        )
    fields = {**manifest.fields}
    if manifest.replicas not in (None, before.replica_count):
        # The number that an autoscaler keeps stays unless the user's changed.
        fields["replicas"] = manifest.replicas or 0
    # A dry run first: what changes nothing is not sent, so that applying twice leaves no trace.
    after = await client.endpoints.update(manifest.name, etag=before.etag, dry_run=True, **fields)
    if dry_run or not differs(before, after):
        return before, after
    return before, await client.endpoints.update(manifest.name, etag=before.etag, **fields)
