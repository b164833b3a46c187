"""The command line as a program: output, exit codes, the text of errors."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import yaml
from link.client.dure_program import CREATE, Dure, finish, with_cli
from link.client.fake_manager import FakeManager, until

from dure.client.context import Context, load_context, save_context
from dure.v1 import admin_pb2, agent_pb2, endpoint_pb2


def test_a_life_of_an_endpoint(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 300_000)

    async def body(fake: FakeManager, dure: Dure) -> None:
        assert "folder m created" in (await dure.ok("folder", "create", "m", "--usage", "model")).out
        assert "1 file, 293.0 KiB" in (await dure.ok("folder", "upload", "m", "model")).out
        created = await dure.ok(*CREATE, "--replicas", "2", "-e", "A=b=c", "-o", "json")
        assert created.json["status"] == "PENDING" and created.json["environ"] == {"A": "b=c"}
        waiting = await dure.start("endpoint", "wait", "chat", "--timeout", "20")
        await until(lambda: fake.watches)
        fake.set("chat", "DEGRADED", ready=1, reason="1 of 2 healthy")
        fake.set("chat", "HEALTHY")
        waited = await finish(waiting)
        assert waited.code == 0, waited
        assert "endpoint chat is HEALTHY at http://127.0.0.1:7100" in waited.out
        assert "chat: PENDING, 0 of 2 ready: waiting for a place" in waited.err
        shown = (await dure.ok("endpoint", "get", "chat", "-o", "json")).json
        assert (shown["status"], shown["address"], shown["replica_count"]) == (
            "HEALTHY",
            "http://127.0.0.1:7100",
            2,
        )
        replicas = shown["replicas"]
        assert isinstance(replicas, list)
        first = replicas[0]
        assert (first["status"], first["health"], first["pid"], first["exit_code"]) == (
            "HEALTHY",
            "HEALTHY",
            1000,
            None,
        )
        assert first["devices"] == [{"device": "SIM-0", "slot": "cuda.shares", "amount": "0.25"}]
        token = await dure.ok("token", "create", "chat", "--expires", "1h", "-q")
        assert token.out.startswith("secret-of-") and token.out.count("\n") == 1 and not token.err
        scaled = await dure.start("endpoint", "scale", "chat", "0", "--wait", "--timeout", "20")
        await until(lambda: fake.watches)
        fake.set("chat", "STOPPED")
        assert (await finish(scaled)).code == 0
        deleted = await dure.start("endpoint", "delete", "chat", "--wait", "--timeout", "20")
        await until(lambda: fake.watches)
        fake.remove("chat")
        assert (await finish(deleted)).code == 0
        assert "No endpoints." in (await dure.ok("endpoint", "list")).err

    with_cli(tmp_path, body)


def test_tables_and_documents(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        await dure.ok(*CREATE, "--replicas", "2")
        fake.set("chat", "DEGRADED", ready=1, reason="one\nof \x1b[31mtwo")
        fake.events["projects/default/endpoints/chat"] = [
            endpoint_pb2.Event(reason="REPLICA_FAILED", message="exit code 3", warning=True)
        ]
        table = (await dure.ok("endpoint", "list")).out.splitlines()
        assert table[0].split() == ["NAME", "STATUS", "READY", "REV", "SHARES", "ADDRESS", "AGE", "REASON"]
        assert table[1].split()[:6] == ["chat", "DEGRADED", "1/2", "1", "0.25", "http://127.0.0.1:7100"]
        assert table[1].endswith("one of ?[31mtwo")
        assert table[0].index("STATUS") == table[1].index("DEGRADED")
        assert list((await dure.ok("endpoint", "list", "-o", "json")).json) == ["endpoints"]
        assert yaml.safe_load((await dure.ok("endpoint", "list", "-o", "yaml")).out)["endpoints"][0]["uid"]
        assert (await dure.ok("endpoint", "list", "-o", "name")).out == "projects/default/endpoints/chat\n"
        assert (await dure.ok("endpoint", "list", "-q")).out == "chat\n"
        replicas = (await dure.ok("endpoint", "replicas", "chat")).out.splitlines()
        assert replicas[0].split() == ["ID", "REV", "NODE", "SHARES", "STATUS", "PROBE", "AGE", "REASON"]
        assert "503 (2 failed)" in replicas[2] and "status 503, expected 200" in replicas[2]
        described = (await dure.ok("endpoint", "get", "chat")).out
        for piece in (
            "Status:",
            "DEGRADED",
            "no: requests need a token",
            "cuda.shares=0.25",
            "exit code 3",
            "0.25",
        ):
            assert piece in described
        assert "REPLICA_FAILED" in (await dure.ok("endpoint", "events", "chat")).out

    with_cli(tmp_path, body)


def test_exit_codes_and_words(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        await dure.ok(*CREATE)
        cases: list[tuple[int, str, list[str]]] = [
            (2, "endpoint create x", ["Missing option '--model'"]),
            (2, "endpoint create x --model m -r cpu", ["`cpu` does not have the form KEY=VALUE"]),
            (2, "endpoint create x --model m -r cpu=1 -r cpu=2", ["given twice"]),
            (2, "endpoint scale chat -1", ["-1"]),
            (2, "token create chat --expires soon", ["neither a duration such as 1h"]),
            (2, "token create chat --expires 2026-12-31T00:00:00", ["no time zone"]),
            (2, "nonsense", ["No such command 'nonsense'"]),
            (3, "endpoint get nope", ["error: there is no endpoint `nope`", "`dure endpoint list`"]),
            (3, "endpoint create x --model nope -r cpu=1", ["`nope`", "`dure folder list`"]),
            (3, "agent get nope", ["`dure agent list`"]),
            (3, "token show chat nope", ["`dure token list ENDPOINT`"]),
            (5, " ".join(CREATE), ["exists already", "`dure endpoint get chat`"]),
            (5, "folder delete m", ["used by endpoint chat"]),
            (5, "endpoint update chat --public --etag old", ["changed meanwhile"]),
            (6, "endpoint wait chat --timeout 0.2", ["waiting for a place", "`dure endpoint wait chat`"]),
            (
                1,
                "endpoint create A_b --model m -r cuda.shares=0.333 -r x=1",
                ["3 problems", "\n  endpoint_id: ", "\n  endpoint.resource_slots[cuda.shares]: ", "0.33"],
            ),
            (1, "folder upload m missing", ["missing: no such file"]),
        ]
        wrong = []
        for code, line, pieces in cases:
            ran = await dure(*line.split())
            if ran.code != code or ran.out or not all(piece in ran.err for piece in pieces):
                wrong.append((line, code, pieces, ran))
        assert not wrong
        fake.set("chat", "BLOCKED", ready=0, reason="exit code 3, five times")
        blocked = await dure("endpoint", "wait", "chat")
        assert blocked.code == 1 and "`dure endpoint retry chat --wait`" in blocked.err

    with_cli(tmp_path, body)


def test_denied_unreachable_and_no_context(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        other = tmp_path / "other.toml"
        save_context(other, Context(fake.address, "wrong"))
        denied = await dure("endpoint", "list", "--context", str(other))
        assert denied.code == 4 and "dure context set --api-key" in denied.err
        save_context(other, Context("127.0.0.1:1", "key"))
        gone = await dure("endpoint", "list", "--context", str(other))
        assert gone.code == 7 and "no manager answers at 127.0.0.1:1" in gone.err and "`dure dev`" in gone.err
        none = await dure("endpoint", "list", "--context", str(tmp_path / "none.toml"))
        assert none.code == 1 and "there is no context file" in none.err and "`dure dev`" in none.err
        other.write_text("manager = 3\nkey = 'x'\n")
        bad = await dure("endpoint", "list", "--context", str(other))
        assert bad.code == 1 and "unknown key `key`" in bad.err and "`api_key` is missing" in bad.err

    with_cli(tmp_path, body)


def test_watch_prints_a_document_per_change(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        await dure.ok(*CREATE)
        process = await dure.start("endpoint", "list", "-w", "-o", "json")
        assert process.stdout is not None
        assert json.loads(await process.stdout.readline())["status"] == "PENDING"
        await fake.drop_watches()
        fake.set("chat", "HEALTHY")
        assert json.loads(await process.stdout.readline())["status"] == "HEALTHY"
        fake.remove("chat")
        assert json.loads(await process.stdout.readline())["removed"] is True
        process.send_signal(signal.SIGINT)
        ran = await finish(process)
        assert (ran.code, ran.err.strip()) == (130, "")

    with_cli(tmp_path, body)


def test_watch_of_one_endpoint_ends_with_it(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        await dure.ok(*CREATE)
        process = await dure.start("endpoint", "get", "chat", "-w")
        await until(lambda: fake.watches)
        fake.set("chat", "HEALTHY")
        fake.remove("chat")
        ran = await finish(process)
        assert ran.code == 0 and ran.out.splitlines()[0].startswith("NAME")
        assert "chat is gone" in ran.err

    with_cli(tmp_path, body)


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        await dure.ok(*CREATE)
        process = await dure.start("endpoint", "list", "-w", "-o", "json")
        assert process.stdout is not None and process.stderr is not None
        await process.stdout.readline()
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        fake.set("chat", "HEALTHY")
        assert await process.stderr.read() == b""
        assert await process.wait() == 1

    with_cli(tmp_path, body)


def test_folder_commands(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "a").write_text("A")
    (tmp_path / "d" / "sub" / "b").write_text("B")
    (tmp_path / "d" / "leak").symlink_to("/etc/hostname")

    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "f")
        refused = await dure("folder", "upload", "f", "d")
        assert refused.code == 1 and "--follow-symlinks" in refused.err
        await dure.ok("folder", "upload", "f", "d", "--follow-symlinks", "--to", "top")
        assert sorted(fake.files["projects/default/folders/f"]) == ["top/a", "top/leak", "top/sub/b"]
        assert (await dure.ok("folder", "ls", "f", "top/sub", "-q")).out == "top/sub/b\n"
        await dure.ok("folder", "download", "f", "top/sub", "got")
        assert (tmp_path / "got" / "b").read_text() == "B"
        await dure.ok("folder", "download", "f", "top/a", "got/")
        assert (tmp_path / "got" / "a").read_text() == "A"
        full = await dure("folder", "rm", "f", "top")
        assert full.code == 5 and "-r" in full.err
        await dure.ok("folder", "rm", "f", "top", "-r")
        assert (await dure.ok("folder", "list", "-o", "json")).json["folders"]
        await dure.ok("folder", "delete", "f")

    with_cli(tmp_path, body)


def test_tokens_agents_and_join_tokens(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        await dure.ok(*CREATE)
        token = (
            await dure.ok("token", "create", "chat", "--expires", "7d", "--label", "ci", "-o", "json")
        ).json
        assert token["status"] == "ACTIVE"
        uid = str(token["uid"])
        assert (await dure.ok("token", "show", "chat", uid, "-q")).out.strip() == token["secret"]
        assert "revoked" in (await dure.ok("token", "revoke", str(token["name"]))).out
        listed = (await dure.ok("token", "list", "chat")).out
        assert uid in listed and "REVOKED" in listed and "ci" in listed
        agent = agent_pb2.Agent(
            name="agents/n1", status=agent_pb2.AGENT_STATUS_ALIVE, limitations=["no cgroup"]
        )
        agent.slots.add(slot="cuda.shares", capacity="2.00", used="0.25")
        agent.devices.add(
            id="SIM-0", model="simulated", accelerator="simulated", healthy=True, memory_bytes=2**30
        )
        agent.devices.add(
            id="MIG-1", parent="GPU-1", model="A100", healthy=True, enforcement="mig", used_shares="0.40",
            shares="0.42", numa_node=1,
        )  # fmt: skip
        fake.agents.append(agent)
        assert "0.25/2.00" in (await dure.ok("agent", "list")).out
        described = (await dure.ok("agent", "get", "n1")).out
        assert "no cgroup" in described and "SIMULATED" in described
        assert "MIG-1 (part of GPU-1)" in described and "0.40/0.42" in described and "mig" in described
        wide = (await dure.ok("agent", "list", "-o", "wide")).out
        assert "ENFORCES" in wide and "mig" in wide
        assert (await dure.ok("agent", "list", "-o", "json")).json["agents"]
        join = await dure.ok("join-token", "create", "agent", "--ttl", "90s")
        assert join.out == f"DURE_JOIN_TOKEN=dure_join_token dure agent --manager {fake.address}\n"
        assert fake.join_requests[0].role == admin_pb2.JOIN_ROLE_AGENT
        assert fake.join_requests[0].ttl.seconds == 90

    with_cli(tmp_path, body)


def test_doctor(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        empty = await dure("doctor")
        assert empty.code == 1 and "FAILED" in empty.out and "dure join-token create agent" in empty.out
        fake.agents.append(agent_pb2.Agent(name="agents/n1", status=agent_pb2.AGENT_STATUS_ALIVE))
        proxy = fake.cluster.proxies.add(name="proxies/p1", connected=True, applied_revision_number=7)

        async def ready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_server(ready, "127.0.0.1", 0) as server:
            proxy.admin_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            well = await dure("doctor", "-o", "json")
            assert well.code == 0 and well.json["ok"] is True, well
            proxy.unreachable_targets.append("10.0.0.1:20000")
            ill = await dure("doctor", "--wait", "0.5")
            assert ill.code == 6 and "cannot reach 10.0.0.1:20000" in ill.out
            del proxy.unreachable_targets[:]
            fake.cluster.route_revision_number = 9
            asked = fake.calls.count("GetCluster")
            behind = await dure.start("doctor", "--wait", "20")
            await until(lambda: fake.calls.count("GetCluster") > asked)
            proxy.applied_revision_number = 9
            assert (await finish(behind)).code == 0
        proxy.admin_url = "http://127.0.0.1:1"
        down = await dure("doctor")
        assert down.code == 1 and "http://127.0.0.1:1/readyz" in down.out
        dure.environ["DURE_CONTEXT_FILE"] = str(tmp_path / "later.toml")
        early = await dure.start("doctor", "--wait", "0.3")
        assert (await finish(early)).code == 6

    with_cli(tmp_path, body)


def test_context_commands(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        path = tmp_path / "sub" / "mine.toml"
        half = await dure("context", "set", "--context", str(path), "--manager", "h:1")
        assert half.code == 2 and "both --manager and --api-key" in half.err
        await dure.ok(
            "context", "set", "--context", str(path), "--manager", "h:1", "--api-key", "dure_key_secret"
        )
        assert path.stat().st_mode & 0o777 == 0o600
        await dure.ok("context", "set", "--context", str(path), "--project", "other")
        assert load_context(path) == Context("h:1", "dure_key_secret", "other")
        shown = await dure.ok("context", "show", "--context", str(path))
        assert "secret" not in shown.out and "h:1" in shown.out
        assert (await dure("context", "set", "--context", str(path), "--manager", "nonsense")).code == 2

    with_cli(tmp_path, body)


def test_help_answers_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        dure = Dure(tmp_path / "none", tmp_path)
        took = []
        for _ in range(3):
            began = time.monotonic()
            ran = await dure.ok("--help")
            took.append(time.monotonic() - began)
            assert "endpoint" in ran.out and "manager" in ran.out
        assert min(took) < 0.4
        assert (await dure.ok("--version")).out.startswith("dure 0.")

    asyncio.run(run())
