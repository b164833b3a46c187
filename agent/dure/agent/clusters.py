"""A kernel's place in a session of several: names that resolve, variables, keys, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dure.fleet.v1 import fleet_pb2

# What a node without a table of its own would have.
HOSTS_DEFAULT = "127.0.0.1 localhost\n::1 localhost\n"


def size(spec: fleet_pb2.KernelSpec) -> int:
    """Number of kernels of the session."""
    return max(1, spec.cluster.size)


def host(spec: fleet_pb2.KernelSpec) -> str:
    """The kernel's own name."""
    return f"{spec.cluster.role or 'main'}{spec.cluster.index or 1}"


def is_probed(spec: fleet_pb2.KernelSpec) -> bool:
    """Only main1 serves; of the others nobody knows on which port they listen, or whether they do."""
    return (spec.cluster.role or "main") == "main"


def own_network(cluster: fleet_pb2.Cluster) -> bool:
    """Whether contained kernels of the session meet in a network of its own; if not, they have that of their
    node."""
    return cluster.one_node or cluster.overlay


def problem(cluster: fleet_pb2.Cluster) -> str:
    """What makes a place in a session of several kernels impossible; empty if nothing does."""
    own = f"{cluster.role}{cluster.index}"
    if len(cluster.hosts) != cluster.size or len(cluster.addresses) != cluster.size:
        names, addresses = len(cluster.hosts), len(cluster.addresses)
        return f"it has {cluster.size} kernels, names of {names} and addresses of {addresses}"
    if own not in cluster.hosts:
        return f"`{own}` is none of its kernels ({', '.join(cluster.hosts)})"
    if not cluster.rendezvous_port:
        return "it has no port for its kernels to find each other"
    return ""


def variables(spec: fleet_pb2.KernelSpec) -> dict[str, str]:
    """What images made for Backend.AI expect and, with several kernels, distributed programs read."""
    cluster = spec.cluster
    own, hosts = host(spec), list(cluster.hosts) or [host(spec)]
    mains = sum(name.startswith("main") for name in hosts)
    replicas = f"main:{mains}" + (f",sub:{len(hosts) - mains}" if len(hosts) > mains else "")
    found = {
        "BACKENDAI_CLUSTER_SIZE": str(size(spec)),
        "BACKENDAI_CLUSTER_HOSTS": ",".join(hosts),
        "BACKENDAI_CLUSTER_HOST": own,
        "BACKENDAI_CLUSTER_ROLE": cluster.role or "main",
        "BACKENDAI_CLUSTER_IDX": str(cluster.index or 1),
        "BACKENDAI_CLUSTER_LOCAL_RANK": str(cluster.local_rank),
        "BACKENDAI_CLUSTER_REPLICAS": replicas,
    }
    if size(spec) > 1:
        found |= {
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": str(cluster.rendezvous_port),
            "WORLD_SIZE": str(size(spec)),
            "RANK": str(hosts.index(own) if own in hosts else 0),
            "LOCAL_RANK": str(cluster.local_rank),
        }
    return found


def host_table(own: str, names: Sequence[str], addresses: Sequence[str]) -> str:
    """A table of host names: the session's, then those of the node's own table."""
    ours = "".join(f"{address} {name}\n" for name, address in zip(names, addresses, strict=True))
    # First: the first line with a name is the one that counts.
    return ours + (own or HOSTS_DEFAULT)


def ssh_files(keys: fleet_pb2.SshKeyPair, names: Sequence[str], home: str) -> Mapping[str, tuple[str, int]]:
    """Files of `.ssh`, each with its mode. `home` is the session's, which is not that of its user."""
    folder = f"{home}/.ssh"
    config = (
        f"Host {' '.join(names)}\n"
        f"    IdentityFile {folder}/id_ed25519\n"
        f"    UserKnownHostsFile {folder}/known_hosts\n"
        "    StrictHostKeyChecking accept-new\n"
    )
    private = keys.private_key.rstrip("\n") + "\n"
    public = keys.public_key.rstrip("\n") + "\n"
    return {
        "id_ed25519": (private, 0o600),
        "id_ed25519.pub": (public, 0o644),
        "authorized_keys": (public, 0o600),
        "config": (config, 0o600),
    }
