"""A kernel's place in its session, as values."""

from __future__ import annotations

from dure.agent import clusters
from dure.fleet.v1 import fleet_pb2

HOSTS = ["main1", "sub1", "sub2"]


def kernel(role: str = "sub", index: int = 2, **fields) -> fleet_pb2.KernelSpec:
    place: dict = {
        "role": role,
        "index": index,
        "size": 3,
        "hosts": HOSTS,
        "addresses": ["10.0.0.1", "10.0.0.1", "10.0.0.2"],
        "rendezvous_port": 25_000,
        "local_rank": 0,
    }
    return fleet_pb2.KernelSpec(cluster=fleet_pb2.Cluster(**{**place, **fields}))


def test_variables_of_several_and_of_one() -> None:
    found = clusters.variables(kernel())
    assert found["RANK"] == "2" and found["LOCAL_RANK"] == "0" and found["WORLD_SIZE"] == "3"
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("main1", "25000")
    assert found["BACKENDAI_CLUSTER_REPLICAS"] == "main:1,sub:2"
    alone = clusters.variables(fleet_pb2.KernelSpec())
    assert alone["BACKENDAI_CLUSTER_HOSTS"] == "main1" and alone["BACKENDAI_CLUSTER_REPLICAS"] == "main:1"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"} & set(alone)


def test_only_main_is_probed() -> None:
    assert clusters.is_probed(kernel("main", 1)) and clusters.is_probed(fleet_pb2.KernelSpec())
    assert not clusters.is_probed(kernel())


def test_places_that_make_no_sense() -> None:
    assert clusters.problem(kernel().cluster) == ""
    assert "names of 2" in clusters.problem(kernel(hosts=HOSTS[:2]).cluster)
    assert "addresses of 1" in clusters.problem(kernel(addresses=["x"]).cluster)
    assert "`sub7` is none" in clusters.problem(kernel(index=7).cluster)
    assert "no port" in clusters.problem(kernel(rendezvous_port=0).cluster)


def test_the_session_comes_before_the_node_in_its_table() -> None:
    table = clusters.host_table(
        "127.0.0.1 localhost\n9.9.9.9 main1\n", HOSTS, ["10.0.0.1", "10.0.0.2", "::1"]
    )
    assert table.splitlines() == [
        *("10.0.0.1 main1", "10.0.0.2 sub1", "::1 sub2"),
        *("127.0.0.1 localhost", "9.9.9.9 main1"),
    ]
    assert "localhost" in clusters.host_table("", HOSTS, ["10.0.0.1"] * 3)


def test_keys_end_in_a_line_break_and_are_private() -> None:
    keys = fleet_pb2.SshKeyPair(private_key="secret", public_key="ssh-ed25519 AAAA c\n\n")
    files = clusters.ssh_files(keys, HOSTS, "/home/work")
    assert files["id_ed25519"] == ("secret\n", 0o600)
    assert files["authorized_keys"] == ("ssh-ed25519 AAAA c\n", 0o600) == (files["id_ed25519.pub"][0], 0o600)
    assert "Host main1 sub1 sub2\n" in files["config"][0]
    assert "IdentityFile /home/work/.ssh/id_ed25519" in files["config"][0]
