"""From a revision to what placement is asked, and from its answer to rows of kernels."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.ext.asyncio import AsyncSession

from dure.fleet.v1 import fleet_pb2
from dure.manager import schema
from dure.manager.model import KernelHealth, KernelPhase
from dure.manager.placement import Placed, Request
from dure.manager.store import new_uid


async def request(
    session: AsyncSession, revision: schema.Revision, peers: Mapping[str, int], salt: str = ""
) -> Request:
    """What a session of a revision needs; `salt` is anything that differs from session to session."""
    spec = revision.spec
    template = fleet_pb2.KernelSpec.FromString(revision.kernel)
    group = await session.get(schema.ResourceGroup, spec["resource_group"])
    return Request(
        slots=spec["slots"],
        resource_group=spec["resource_group"],
        fixed_port=template.port if template.fixed_port else 0,
        peers=peers,
        size=spec["cluster_size"],
        several_nodes=spec["cluster_mode"] == "MULTI_NODE",
        pack=group is not None and group.policy == "PACK",
        architecture=spec["architecture"],
        needs_image=spec["needs_image"],
        has_image=bool(template.image),
        needs_mounts=bool(template.extra_mounts) or template.shared_memory_bytes > 0,
        salt=zlib.crc32(salt.encode()),
        enforcement=template.require_enforcement,
        strict=_strict(template, group),
    )


def _strict(template: fleet_pb2.KernelSpec, group: schema.ResourceGroup | None) -> str:
    """Who asks for the profile `strict`, for people; empty if nobody does."""
    if template.security_profile == fleet_pb2.SECURITY_PROFILE_STRICT:
        return "the endpoint"
    if group is not None and group.security_profile == "STRICT":
        return f"the resource group `{group.name}`"
    return ""


def peers(kernels: Iterable[schema.Kernel]) -> dict[str, int]:
    """How many replicas each agent has, by their main kernels."""
    counts: dict[str, int] = {}
    for kernel in kernels:
        if kernel.role == "main":
            counts[kernel.agent_uid] = counts.get(kernel.agent_uid, 0) + 1
    return counts


def kernels(replica: schema.Replica, placed: Placed, request: Request) -> list[schema.Kernel]:
    """Rows of a session's kernels at the places that were found; main1 first."""
    return [
        schema.Kernel(
            uid=new_uid(),
            replica_uid=replica.uid,
            endpoint_uid=replica.endpoint_uid,
            session_uid=replica.session_uid,
            agent_uid=place.grant.agent_uid,
            role="sub" if number else "main",
            index=number or 1,
            generation=1,
            wanted=True,
            slots=dict(place.grant.slots),
            devices=[{"device": d.device, "slot": d.slot, "amount": d.amount} for d in place.grant.devices],
            strict=bool(request.strict),
            fixed_port=place.grant.fixed_port,
            rendezvous_port=place.grant.rendezvous_port,
            phase=KernelPhase.ASSIGNED.value,
            health=KernelHealth.UNKNOWN.value,
            status=b"",
        )
        for number, place in enumerate(placed.kernels)
    ]


def new_ssh_key() -> str:
    """A private key in OpenSSH's format, for one session of several kernels."""
    return (
        Ed25519PrivateKey.generate()
        .private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        .decode("ascii")
    )


def ssh_key_pair(private_key: str, comment: str) -> fleet_pb2.SshKeyPair:
    """The pair, as kernels get it."""
    key = serialization.load_ssh_private_key(private_key.encode("ascii"), None)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return fleet_pb2.SshKeyPair(private_key=private_key, public_key=f"{public.decode('ascii')} {comment}")
