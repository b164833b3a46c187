"""The swarm that an engine is in: engines of one can share a network (an overlay)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID

UNKNOWN = (
    "the container engine is a worker of a swarm and its certificate cannot be read: sessions over several "
    "nodes have the network of each node"
)
# In the engine's own folder, readable by all.
CERTIFICATE = "swarm/certificates/swarm-node.crt"


def is_member(info: Mapping[str, Any]) -> bool:
    return bool(_swarm(info).get("LocalNodeState") == "active")


def is_manager(info: Mapping[str, Any]) -> bool:
    """Whether the engine can make networks of the swarm."""
    return is_member(info) and bool(_swarm(info).get("ControlAvailable"))


def id_of(info: Mapping[str, Any]) -> str:
    """The same for all engines of one swarm; empty if the engine is in none, or it cannot be told."""
    if not is_member(info):
        return ""
    told = (_swarm(info).get("Cluster") or {}).get("ID")
    if told:
        return str(told)
    # Workers are not told. The certificate by which a node takes part has the swarm as its organisation.
    try:
        data = Path(str(info.get("DockerRootDir") or "/var/lib/docker"), CERTIFICATE).read_bytes()
        names = x509.load_pem_x509_certificate(data).subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    except (OSError, ValueError):
        return ""
    return str(names[0].value) if names else ""


def _swarm(info: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = info.get("Swarm") or {}
    return found
