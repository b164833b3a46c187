"""What the Docker back end decides: requests, labels, ends, words; without an engine."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from dure.agent.backends import outcome
from dure.agent.backends.base import Bind, Container, Handle, Injection, Plan
from dure.agent.backends.docker import (
    images,
    labels,
    networks,
    node,
    request,
    starting,
    streams,
    swarm,
    users,
)
from dure.agent.backends.docker.engine import NoAnswer
from dure.agent.backends.docker.labels import Owner
from dure.agent.backends.docker.logs import Place
from dure.agent.backends.docker.request import Image, Node
from dure.fleet.v1 import fleet_pb2

OWNER = Owner("agent-1", "/var/lib/dure/agents/n")
IMAGE = Image("sha256:1", "x86_64", "", ("/entry",), ("arg",))
NODE = Node("0.0.0.0", range(20000, 20064), "", {"nofile": 4096, "memlock": -1})


async def nothing() -> tuple[str, str]:
    return "", ""


async def few() -> range:
    return range(20000, 20001)


def plan(**fields: object) -> Plan:
    given = {
        "handle": Handle("k1", Path("/kernels/k1")),
        "model": None,
        "model_target": "/models",
        "model_path": "/models/x",
        "argv": ("serve", "{port}"),
        "shell": "",
        "line": "",
        "actions": (),
        "environ": {"A": "b"},
        "port": 8000,
        "cpu_milli": 1500,
        "memory_bytes": 2**30,
        "stop_grace_s": 1.0,
        **fields,
    }
    return Plan(**given)  # type: ignore[arg-type]


def container(strict: bool = False, names: tuple[str, ...] = (), **fields: object) -> Container:
    profile = fleet_pb2.SECURITY_PROFILE_STRICT if strict else fleet_pb2.SECURITY_PROFILE_DEFAULT
    given = {
        "spec": fleet_pb2.KernelSpec(uid="k1", security_profile=profile),
        "agent": "n",
        "host": "127.0.0.1",
        "hostname": "main1",
        "devices": (),
        "credential": nothing,
        "free_ports": few,
        "names": names,
        "addresses": tuple("10.0.0.1" for _ in names),
        **fields,
    }
    return Container(**given)  # type: ignore[arg-type]


def body(
    one: Plan | None = None,
    other: Container | None = None,
    image: Image = IMAGE,
    where: Node = NODE,
    command: tuple[str, ...] = ("serve", "8000"),
    network: str = "",
):
    return request.body(
        one or plan(),
        other or container(),
        image,
        where,
        labels={"x": "y"},
        binds=[Bind("/a", "/b", True)],
        command=command,
        network=network,
    )


@given(
    st.booleans(),
    st.integers(1, 10**6),
    st.integers(1, 2**45),
    st.integers(0, 2**40),
    st.sampled_from([{}, {"nofile": -1}, {"nofile": 100, "memlock": 65536}, {"memlock": -1}]),
)
def test_no_request_leaves_out_a_limit(strict, cpu_milli, memory_bytes, shm, hard) -> None:
    one = plan(cpu_milli=cpu_milli, memory_bytes=memory_bytes, shared_memory_bytes=shm)
    made = body(one, container(strict), where=Node("0.0.0.0", range(1, 9), "", hard))
    settings = made["HostConfig"]
    assert settings["Memory"] == settings["MemorySwap"] >= min(memory_bytes, 6 * 2**20)
    assert settings["CpuPeriod"] == 100_000 and settings["CpuQuota"] >= 1000
    assert settings["CpuQuota"] == 1000 or settings["CpuQuota"] == cpu_milli * 100
    assert settings["PidsLimit"] == 4096 and settings["Init"] is True
    assert settings["LogConfig"]["Config"] == {"max-size": "8m", "max-file": "2"}
    assert settings["SecurityOpt"] == ["no-new-privileges"], "and nothing of seccomp: the engine's own holds"
    assert settings["ReadonlyRootfs"] is strict and settings["CapDrop"][0] == ("ALL" if strict else "MKNOD")
    assert "Privileged" not in settings and settings["RestartPolicy"] == {"Name": "no"}
    assert settings.get("ShmSize", 0) == shm
    for limit in settings["Ulimits"]:
        most = hard[limit["Name"]]
        assert limit["Soft"] == limit["Hard"] and (most == -1 or 0 < limit["Hard"] <= most)
    json.dumps(made)


@pytest.mark.parametrize(
    ("named", "normal", "strict"),
    [
        ("", "", "1000:1000"),
        ("root", "", "1000:1000"),
        ("0:0", "", "1000:1000"),
        ("000", "", "1000:1000"),
        ("root:video", "", "1000:1000"),
        ("1234", "1234", "1234"),
        ("www-data:www-data", "www-data:www-data", "www-data:www-data"),
    ],
)
def test_whom_a_command_runs_as(named: str, normal: str, strict: str) -> None:
    image = Image("i", "", named, (), ())
    assert (request.user(image, False), request.user(image, True)) == (normal, strict)


def test_commands() -> None:
    assert request.command(plan(), IMAGE) == ("serve", "{port}")
    assert request.command(plan(argv=()), IMAGE) == ("/entry", "arg")
    assert request.command(plan(shell="/bin/bash", line="a b"), IMAGE) == ("/bin/bash", "-c", "a b")
    made = body()
    assert (made["Entrypoint"], made["Cmd"], made["WorkingDir"]) == (["serve"], ["8000"], "/models/x")
    made = body(plan(argv=()), command=())
    # The image's own, in its own folder.
    assert not {"Entrypoint", "Cmd", "WorkingDir"} & made.keys()


def test_networks_and_ports() -> None:
    settings = body()["HostConfig"]
    assert settings["NetworkMode"] == "default"
    assert settings["PortBindings"] == {"8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "20000-20063"}]}
    alone = Node("127.0.0.1", range(7, 8))
    assert body(where=alone)["HostConfig"]["PortBindings"]["8000/tcp"][0]["HostPort"] == "7"
    spec = fleet_pb2.KernelSpec(uid="k1", cluster=fleet_pb2.Cluster(one_node=True))
    made = body(other=container(names=("main1", "sub1"), addresses=(), spec=spec), network="n")
    assert made["HostConfig"]["NetworkMode"] == "n" and made["Hostname"] == "main1"
    assert made["NetworkingConfig"] == {"EndpointsConfig": {"n": {"Aliases": ["main1"]}}}
    spec.cluster.CopyFrom(fleet_pb2.Cluster(overlay=True))
    made = body(other=container(names=("main1", "sub1"), addresses=(), spec=spec), network="n")
    assert made["HostConfig"]["NetworkMode"] == "n" and "PortBindings" in made["HostConfig"]
    made = body(other=container(names=("main1", "sub1")))
    assert made["HostConfig"]["NetworkMode"] == "host"
    assert made["HostConfig"]["ExtraHosts"] == ["main1:10.0.0.1", "sub1:10.0.0.1"]
    assert "PortBindings" not in made["HostConfig"] and "Hostname" not in made


def test_an_overlay_has_one_name_on_all_nodes_and_a_bridge_has_not() -> None:
    other = Owner("agent-2", "/var/lib/dure/agents/m")
    for place, same in (({"overlay": True}, True), ({"one_node": True}, False)):
        spec = fleet_pb2.KernelSpec(session_uid="s", cluster=fleet_pb2.Cluster(**place))
        assert (networks.name_of(spec, OWNER) == networks.name_of(spec, other)) == same
        assert networks.name_of(spec, OWNER).startswith("dure-s")
    assert networks.name_of(fleet_pb2.KernelSpec(session_uid="s"), OWNER) == ""
    said = "Could not attach to network dure-s: rpc error: code = NotFound desc = network dure-s not found"
    assert starting.lacks_network(said, "dure-s")
    assert not starting.lacks_network("executable file not found", "dure-s")


def test_the_swarm_of_a_worker_stands_in_its_certificate(tmp_path: Path) -> None:
    def info(**fields: object) -> dict[str, object]:
        return {"DockerRootDir": str(tmp_path), "Swarm": {"LocalNodeState": "active", **fields}}

    manager = info(ControlAvailable=True, Cluster={"ID": "swarm-1"})
    assert (swarm.id_of(manager), swarm.is_manager(manager)) == ("swarm-1", True)
    for alone in ({}, {"Swarm": None}, info(LocalNodeState="inactive", Cluster={"ID": "swarm-1"})):
        assert (swarm.id_of(alone), swarm.is_member(alone), swarm.is_manager(alone)) == ("", False, False)
    file = tmp_path / swarm.CERTIFICATE
    file.parent.mkdir(parents=True)
    for words in (None, "no certificate"):
        if words is not None:
            file.write_text(words)
        assert (swarm.id_of(info()), swarm.is_member(info())) == ("", True)
    file.write_bytes(_certificate("swarm-1", "swarm-worker", "node-1"))
    assert (swarm.id_of(info()), swarm.is_manager(info())) == ("swarm-1", False)


def _certificate(organisation: str, unit: str, name: str) -> bytes:
    """As engines of a swarm have it."""
    who = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    key, now = Ed25519PrivateKey.generate(), datetime.now(UTC)
    made = x509.CertificateBuilder(who, who, key.public_key(), 1, now, now + timedelta(days=90))
    return made.sign(key, None).public_bytes(Encoding.PEM)


def test_gpus_are_asked_for_by_name_and_all_others_are_hidden() -> None:
    gpus = tuple(fleet_pb2.Device(id=f"GPU-{n}", accelerator="cuda") for n in (1, 2))
    pretended = fleet_pb2.Device(id="SIM-1", accelerator="simulated")
    for way, wanted in {
        "nvidia": [{"Driver": "nvidia", "DeviceIDs": ["GPU-1", "GPU-2"], "Capabilities": [["gpu"]]}],
        "cdi": [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-1", "nvidia.com/gpu=GPU-2"]}],
        "environment": [],
    }.items():
        made = body(other=container(devices=(*gpus, pretended)), where=Node("::", range(1, 2), way))
        assert made["HostConfig"].get("DeviceRequests", []) == wanted
        assert "NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2" in made["Env"]
    made = body(other=container(devices=(pretended,)))
    assert "DeviceRequests" not in made["HostConfig"] and "NVIDIA_VISIBLE_DEVICES=void" in made["Env"]
    injected = Injection({"A": "c"}, (Bind("/x", "/y", True),), True)
    made = body(plan(injection=injected, shared_memory_bytes=5))
    assert "A=c" in made["Env"] and "A=b" not in made["Env"]
    assert made["HostConfig"]["IpcMode"] == "host" and "ShmSize" not in made["HostConfig"]
    assert made["HostConfig"]["Mounts"][-1]["Target"] == "/y"


SPECS = st.builds(
    fleet_pb2.KernelSpec,
    uid=st.text("abc-0", min_size=1, max_size=9),
    session_uid=st.text(max_size=9),
    generation=st.integers(0, 2**40),
    environ=st.dictionaries(st.text(max_size=5), st.text(max_size=30), max_size=4),
    port=st.integers(1, 65535),
)


@given(SPECS, st.data())
def test_a_container_says_who_it_is_and_a_broken_word_is_noticed(spec, data) -> None:
    full = fleet_pb2.KernelSpec()
    full.CopyFrom(spec)
    full.ssh_keys.private_key = "secret"
    made = labels.labels(full, OWNER, "n", "boot", port=8000, own_network=True, gated=False)
    assert labels.spec_of(made) == spec, "all but the keys"
    assert "secret" not in str(made) and all(isinstance(value, str) for value in made.values())
    assert {f"{key}={value}" for key, value in made.items()} >= set(OWNER.filters)
    broken = dict(made)
    key = data.draw(st.sampled_from([labels.SPEC, labels.SPEC_HASH, labels.KERNEL]))
    broken[key] = data.draw(st.text(max_size=40).filter(lambda text: text != made[key]))
    assert labels.spec_of(broken) is None
    assert labels.spec_of({}) is None


def inspected(given: dict[str, str] | None = None, ports: object = None, **state: object):
    return {
        "Id": "c1",
        "State": {"Status": "exited", "Pid": 0, "StartedAt": "2026-01-02T03:04:05.5Z", **state},
        "Config": {"Labels": {labels.BOOT: "boot", **(given or {})}},
        "NetworkSettings": {"Ports": ports},
    }


def test_what_an_inspection_tells() -> None:
    published = {"8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "20001"}], "9/tcp": None}
    seen = labels.seen(inspected({labels.PORT: "8000"}, published, Status="running", Pid=7))
    assert (seen.running, seen.pid, seen.port, seen.own_port) == (True, 7, 20001, 8000)
    assert seen.started_s == datetime(2026, 1, 2, 3, 4, 5, 500_000, UTC).timestamp()
    assert labels.seen(inspected({labels.PORT: "8000"}, None)).port == 0
    leased = labels.seen(inspected({labels.PORT: "", labels.LEASED: "20005"}))
    assert (leased.port, leased.own_port) == (20005, 0)
    for status in ("running", "paused", "restarting"):
        assert labels.seen(inspected(Status=status)).running, "it has not ended"
    never = labels.seen(inspected(Status="created", StartedAt="0001-01-01T00:00:00Z"))
    assert not never.running and never.started_s == 0


@pytest.mark.parametrize(
    ("state", "reason", "code", "words"),
    [
        ({"ExitCode": 0}, "EXITED", 0, "code 0"),
        ({"ExitCode": 3}, "EXITED", 3, "code 3"),
        ({"ExitCode": 137}, "SIGNALED", 137, "SIGKILL"),
        ({"ExitCode": 143}, "SIGNALED", 143, "SIGTERM"),
        ({"ExitCode": 255}, "EXITED", 255, "code 255"),
        ({"ExitCode": 137, "OOMKilled": True}, "OOM", 137, "more memory"),
        ({"ExitCode": 1, "OOMKilled": True}, "OOM", 1, "more memory"),
        ({"ExitCode": 0, "OOMKilled": True}, "OOM", 0, "a process of it"),
        (
            {"ExitCode": 128, "StartedAt": "", "Error": "no such device"},
            "START_FAILED",
            128,
            "no such device",
        ),
    ],
)
def test_how_containers_end(state: dict[str, object], reason: str, code: int, words: str) -> None:
    ended = outcome.read(labels.ended(labels.seen(inspected(**state)), "boot"))
    assert (ended.reason, ended.code) == (reason, code) and words in ended.message
    assert outcome.read(labels.ended(labels.seen(inspected(**state)), "next")).reason == "NODE_REBOOTED"


@given(st.integers(1, 7 * 10**9), st.integers(0, 10**9 - 1), st.integers(0, 9))
def test_times_to_the_nanosecond(unix_s, nanoseconds, digits) -> None:
    when = datetime.fromtimestamp(unix_s, UTC)
    cut = f"{nanoseconds:09}"[:digits]
    text = when.strftime("%Y-%m-%dT%H:%M:%S") + (f".{cut}" if cut else "")
    wanted = int(when.timestamp()) * 10**9 + int(cut.ljust(9, "0"))
    assert labels.unix_ns(f"{text}Z") == labels.unix_ns(f"{text}+00:00") == wanted
    assert labels.unix_ns("0001-01-01T00:00:00Z") == labels.unix_ns("") == 0


@given(st.lists(st.integers(1, 6), max_size=40).map(sorted), st.data())
def test_a_log_that_is_read_again_tells_each_line_once(times, data) -> None:
    """Cut anywhere, any number of times: every line comes, and comes once."""
    lines = [(time, number) for number, time in enumerate(times)]
    place, told, known = Place(), [], 0
    while known < len(lines) or not told:
        since = place.since()
        from_ns = int(float(since) * 10**9 + 0.5) if since else 0
        end = data.draw(st.integers(known, len(lines)))
        told += [line for line in lines[:end] if line[0] >= from_ns and place.is_new(line[0])]
        if known == end == len(lines):
            break
        known = max(known, end)
    assert told == lines


@pytest.mark.parametrize(
    ("said", "reason", "words"),
    [
        ("... Bind for 0.0.0.0:80 failed: port is already allocated", "PORT_FAILED", "already allocated"),
        ("listen tcp 0.0.0.0:80: bind: address already in use", "PORT_FAILED", "in use"),
        (
            'failed: unable to start: caused: exec: "x": executable file not found in $PATH: unknown',
            "START_FAILED",
            "is it in the image?",
        ),
        ("could not select device driver", "START_FAILED", "cannot attach its GPUs"),
        ('caused: exec: "/models": permission denied: unknown', "START_FAILED", "chmod +x"),
        ("invalid mount config", "START_FAILED", "could not run it: invalid mount config"),
    ],
)
def test_what_users_read_of_a_start_that_failed(said: str, reason: str, words: str) -> None:
    failed = starting.failed(said, plan())
    assert failed.reason == reason and words in str(failed)
    assert "unknown" not in str(failed)


def test_what_init_says_of_a_command() -> None:
    fatal = "some output\n[FATAL tini (7)] exec nope failed: No such file or directory\n"
    assert starting.by_init(127, fatal) == "cannot start `nope`: there is no such program in the image"
    assert "chmod +x" in starting.by_init(126, "[FATAL tini (7)] exec a b failed: Permission denied")
    podman = "ERROR (catatonit:2): failed to exec pid1: No such file or directory"
    assert "no such program" in starting.by_init(127, podman)
    assert starting.by_init(127, "sh: 1: nope: not found") == starting.by_init(3, fatal) == ""
    assert starting.by_init(127, "") == ""


def test_limits_of_processes() -> None:
    text = (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max cpu time              unlimited            unlimited            seconds   \n"
        "Max open files            1024                 524288               files     \n"
        "Max locked memory         8388608              unlimited            bytes     \n"
    )
    assert node.parse_limits(text) == {"nofile": 524288, "memlock": -1}
    assert node.parse_limits("") == {}


def test_what_an_engine_cannot_do_is_said() -> None:
    whole = {
        "MemoryLimit": True,
        "SwapLimit": True,
        "CpuCfsQuota": True,
        "PidsLimit": True,
        "SecurityOptions": ["name=seccomp,profile=default"],
    }
    assert node.limitations(whole, root=True) == []
    poor = {**whole, "SwapLimit": False, "PidsLimit": False, "SecurityOptions": ["name=rootless"]}
    said = node.limitations(poor, root=False)
    assert len(said) == 4 and "swap, processes" in said[0]


def test_where_ports_are_published() -> None:
    assert node.publish_at("127.0.0.1") == "127.0.0.1"
    # An address of a router or a balancer is not the node's own.
    assert node.publish_at("192.0.2.1") == "0.0.0.0"


def test_credentials_of_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert images.auth_header("r.test", "", "") == ""
    given = json.loads(base64.urlsafe_b64decode(images.auth_header("r.test", "ann", "ü:?")))
    assert given == {"username": "ann", "password": "ü:?", "serveraddress": "r.test"}
    login = {"auths": {"r.test": {"auth": base64.b64encode(b"bob:pw").decode()}}}
    (tmp_path / "config.json").write_text(json.dumps(login))
    kept = json.loads(base64.urlsafe_b64decode(images.auth_header("r.test", "", "")))
    assert (kept["username"], kept["password"]) == ("bob", "pw")
    assert images.auth_header("other.test", "", "") == ""


def test_advice_on_a_fetch_that_failed() -> None:
    assert "dure registry set" in images.explained("no basic auth credentials")
    assert "dure registry set" in images.explained("pull access denied for x")
    assert "such a tag" in images.explained("manifest unknown")
    assert "reach the registry" in images.explained("dial tcp: lookup r.test: no such host")
    assert images.explained("something else") == "something else"


def test_whose_a_home_is() -> None:
    passwd = "root:x:0:0::/:\nweb:x:33:34::/:\nbad:x:x:x::/:\n"
    assert users.numbers("") == (0, 0)
    assert users.numbers("web", passwd) == (33, 34) and users.numbers("web:7", passwd) == (33, 7)
    assert users.numbers("33", passwd) == (33, 34) and users.numbers("55") == (55, 0)
    assert users.numbers("bad", passwd) is None is users.numbers("nobody", passwd)
    assert users.is_plain("1:2") and users.is_plain("") and not users.is_plain("1")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        member = tarfile.TarInfo("passwd")
        member.size = len(passwd)
        archive.addfile(member, io.BytesIO(passwd.encode()))
    assert users.unpack([data.getvalue()[:700], data.getvalue()[700:]]) == passwd
    assert users.unpack([b"x" * 2**20, b"x"]) == ""


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers(), min_size=1), max_size=6), st.data())
def test_messages_come_whole_however_they_are_cut(sent, data) -> None:
    text = "".join(json.dumps(one) + "\r\n" for one in sent).encode()

    async def read(tail: bytes) -> list[dict[str, int]]:
        content = asyncio.StreamReader()
        rest = text + tail
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            content.feed_data(rest[:size])
            rest = rest[size:]
        content.feed_eof()
        return [one async for one in streams.messages(_Pieces(content))]

    assert asyncio.run(read(b"")) == sent
    with pytest.raises(NoAnswer, match="no message"):
        asyncio.run(read(b'{"half'))


class _Pieces:
    """A body as aiohttp gives it."""

    def __init__(self, content: asyncio.StreamReader) -> None:
        self._content = content

    async def iter_any(self):
        while piece := await self._content.read(7):
            yield piece
