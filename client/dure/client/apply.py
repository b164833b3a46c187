"""Brings an endpoint to what a manifest says."""

from __future__ import annotations

from dataclasses import dataclass

from dure.client.client import Client
from dure.client.manifest import differs
from dure.client.manifest_reader import Manifest
from dure.client.wanted import EndpointFields
from dure.v1.endpoint_pb2 import Endpoint
from dure.wire.errors import InvalidInput, NotFound, Violation


@dataclass(frozen=True)
class Applied:
    """`before` None: it was made. `after` of a dry run is what would be."""

    before: Endpoint | None
    after: Endpoint


async def apply_manifest(client: Client, manifest: Manifest, *, dry_run: bool = False) -> Applied:
    """Creates the endpoint, or updates it to exactly what the manifest says.

        for manifest in read_manifests(Path("chat.yaml").read_text(), "chat.yaml"):
            await apply_manifest(client, manifest)

    What a manifest leaves out goes back to its default, but for the number of replicas, which stays. Raises
    Conflict when somebody else changes it at the same time: do it again.
    """
    try:
        before = await client.endpoints.get(manifest.name)
    except NotFound:
        fields: EndpointFields = {**manifest.fields}
        fields["replicas"] = 1 if manifest.replicas is None else manifest.replicas
        after = await client.endpoints.create(manifest.name, model=manifest.model, dry_run=dry_run, **fields)
        return Applied(None, after)
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
        return Applied(before, after)
    return Applied(before, await client.endpoints.update(manifest.name, etag=before.etag, **fields))
