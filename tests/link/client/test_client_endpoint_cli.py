"""Every setting of an endpoint from the command line, revisions, rollouts, validation, agents."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import yaml
from link.client.dure_program import CREATE, Dure, finish, with_cli
from link.client.fake_manager import FakeManager, until
from link.client.fake_trials import pieces

from dure.v1 import agent_pb2, endpoint_pb2

CHAT = "projects/default/endpoints/chat"


async def chat(dure: Dure, *arguments: str) -> None:
    await dure.ok("folder", "create", "m", "--usage", "model")
    await dure.ok(*CREATE, *arguments)


def test_create_with_every_setting(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("# of the file\nA=file\nexport B='b c'\n\nC=\n")

    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        line = (
            "endpoint create chat --model m --runtime vllm --replicas 2 -r cpu=2 --preset small --shm 1g "
            "--env-file env -e A=b=c --public --group gpu --image server:1 --architecture aarch64 "
            "--mount data --mount words/en:/words:rw --mount-destination /m --definition d.yaml "
            "--pull-policy always --profile strict --require-enforcement mps "
            "--cluster-mode multi-node --cluster-size 3 --priority 7 --port 9000 --health-path /up "
            "--health-interval 2s --health-delay 0 --health-early --health-retries 3 --health-status 204 "
            "--canary 10:60s,50 --max-surge 50% --max-unavailable 1 --progress-deadline 9s --no-auto-rollback"
        )
        await dure.ok(*line.split(), "--", "serve", "--port", "{port}", "--", "x")
        item = fake.endpoints[CHAT]
        assert (item.runtime, item.replica_count, item.preset, item.shared_memory) == (
            "vllm",
            2,
            "small",
            "1g",
        )
        assert dict(item.environ) == {"A": "b=c", "B": "b c", "C": ""}
        assert (item.open_to_public, item.resource_group, item.image) == (True, "gpu", "server:1")
        assert (item.architecture, item.model_mount_destination) == ("aarch64", "/m")
        assert (item.model_definition_path, item.priority, item.cluster_size) == ("d.yaml", 7, 3)
        assert item.image_pull_policy == endpoint_pb2.IMAGE_PULL_POLICY_ALWAYS
        assert item.security_profile == endpoint_pb2.SECURITY_PROFILE_STRICT
        assert item.require_enforcement == "mps"
        assert item.cluster_mode == endpoint_pb2.CLUSTER_MODE_MULTI_NODE
        first, second = item.extra_mounts
        assert (first.folder, first.target, first.writable) == ("data", "/home/work/data", False)
        assert (second.folder, second.subpath, second.target) == ("words", "en", "/words")
        assert second.writable
        service = item.service
        assert list(service.start_command.args) == ["serve", "--port", "{port}", "--", "x"]
        check = service.health_check
        assert (service.port, check.path, check.interval.seconds) == (9000, "/up", 2)
        assert check.HasField("initial_delay") and check.probe_during_initial_delay
        assert (check.max_retries, check.expected_status_code) == (3, 204)
        policy = item.rollout_policy
        assert policy.strategy == endpoint_pb2.ROLLOUT_STRATEGY_CANARY
        assert [(step.weight, step.HasField("hold")) for step in policy.steps] == [(10, True), (50, False)]
        assert (policy.max_surge, policy.max_unavailable, policy.no_automatic_rollback) == ("50%", "1", True)
        described = (await dure.ok("endpoint", "get", "chat")).out
        for piece in (
            "curl http",
            "Comes to",
            "python serve.py",
            "words/en at /words (writable)",
            "3 kernels",
        ):
            assert piece in described, described

    with_cli(tmp_path, body)


def test_update_sends_what_was_given_and_shows_the_plan(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure, "--replicas", "2", "-e", "A=1", "-e", "B=2", "--mount", "data")
        ran = await dure.ok("endpoint", "update", "chat", "-e", "A=3", "-e", "B-", "-e", "C=4", "--dry-run")
        assert ran.out.splitlines() == [
            "~ environ.A: 1 -> 3",
            "+ environ.C: 4",
            "- environ.B: 2",
            "plan: makes revision 2; replicas are replaced one by one, each once its successor is healthy",
        ]
        assert not fake.updates and dict(fake.endpoints[CHAT].environ) == {"A": "1", "B": "2"}
        await dure.ok("endpoint", "update", "chat", "-e", "A=3", "-e", "B-", "-e", "C=4")
        assert dict(fake.endpoints[CHAT].environ) == {"A": "3", "C": "4"}
        assert list(fake.updates[-1].update_mask.paths) == ["environ"] and fake.updates[-1].endpoint.etag
        ran = await dure.ok("endpoint", "update", "chat", "--replicas", "3", "--private", "--priority", "20")
        assert "plan: no new revision; replicas 2 -> 3" in ran.out and "+ priority: 20" in ran.out
        assert list(fake.updates[-1].update_mask.paths) == ["replica_count", "open_to_public", "priority"]
        ran = await dure.ok("endpoint", "update", "chat", "-r", "mem-", "-r", "cuda.shares=0.5")
        assert dict(fake.endpoints[CHAT].resource_slots) == {"cpu": "1", "cuda.shares": "0.50"}
        await dure.ok("endpoint", "update", "chat", "--mount", "data-", "--mount", "other:/o")
        assert [mount.folder for mount in fake.endpoints[CHAT].extra_mounts] == ["other"]
        await dure.ok("endpoint", "update", "chat", "--command", "serve | tee log", "--health-path", "/a")
        await dure.ok("endpoint", "update", "chat", "--port", "81")
        service = fake.endpoints[CHAT].service
        assert (service.start_command.line, service.port) == ("serve | tee log", 81)
        assert service.health_check.path == "/a"
        await dure.ok(
            "endpoint", "update", "chat", "--reset", "command", "--reset", "environ", "--port", "82"
        )
        assert not fake.endpoints[CHAT].service.HasField("start_command")
        assert fake.endpoints[CHAT].service.port == 82 and not fake.endpoints[CHAT].environ
        ran = await dure.ok("endpoint", "update", "chat", "--port", "82")
        assert "plan: nothing to change" in ran.out and "is so already" in ran.out
        cases = {
            ("endpoint", "update", "chat"): "nothing to change: give at least one option",
            ("endpoint", "update", "chat", "-e", "X-"): "`X` is not set",
            ("endpoint", "update", "chat", "--mount", "x-"): "`x` is not mounted; mounted are: other",
            ("endpoint", "update", "chat", "--mount", "a:b"): "does not have the form FOLDER",
            ("endpoint", "update", "chat", "--canary", "a"): "WEIGHT[:HOLD]",
            ("endpoint", "update", "chat", "--max-surge", "a"): "25%",
            ("endpoint", "update", "chat", "--strategy", "rolling", "--canary", "5"): "belongs to",
            ("endpoint", "update", "chat", "--command", "a", "--", "b"): "not both",
            ("endpoint", "update", "chat", "--"): "nothing stands after `--`",
            ("endpoint", "update", "chat", "stray"): "unexpected extra argument",
            ("endpoint", "create", "x", "--model", "m", "-e", "A-"): "does not have the form KEY=VALUE",
            ("endpoint", "create", "x", "--model", "m", "--shell", "/bin/sh"): "--shell belongs to --command",
        }
        for arguments, said in cases.items():
            ran = await dure(*arguments)
            assert ran.code == 2 and said in ran.err, ran

    with_cli(tmp_path, body)


def test_an_update_that_others_get_in_the_way_of_is_made_anew(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure, "-e", "A=1")
        answered = fake.calls.count("GetEndpoint")

        def interfere() -> None:
            item = fake.endpoints[CHAT]
            item.environ["THEIRS"] = "1"
            item.etag = str(int(item.etag) + 1)

        fake.before_update = [interfere]
        await dure.ok("endpoint", "update", "chat", "-e", "OURS=1")
        assert dict(fake.endpoints[CHAT].environ) == {"A": "1", "THEIRS": "1", "OURS": "1"}
        assert fake.calls.count("GetEndpoint") == answered + 2
        fake.before_update = [interfere]
        etag = fake.endpoints[CHAT].etag
        ran = await dure("endpoint", "update", "chat", "-e", "OURS=2", "--etag", etag)
        assert ran.code == 5 and "changed meanwhile" in ran.err

    with_cli(tmp_path, body)


def test_apply_makes_changes_and_then_nothing(tmp_path: Path) -> None:
    manifest = tmp_path / "chat.yaml"
    text = "name: chat\nmodel: m\nreplicas: 2\nresource_slots: {cpu: 1, mem: 1g}\nenviron: {MODE: a}\n"
    manifest.write_text(text)

    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        planned = await dure.ok("apply", "-f", "chat.yaml", "--dry-run")
        assert "+ environ.MODE: a" in planned.out and "plan: a new endpoint with 2 replicas" in planned.out
        assert not fake.endpoints
        made = await dure.ok("apply", "-f", "chat.yaml")
        assert "endpoint chat created at http://127.0.0.1:7100" in made.out
        again = await dure.ok("apply", "-f", "chat.yaml")
        assert "plan: nothing to change" in again.out and not fake.updates
        await dure.ok("endpoint", "scale", "chat", "5")
        manifest.write_text(text.replace("replicas: 2\n", "").replace("MODE: a", "MODE: b, X: y"))
        planned = await dure.ok("apply", "-f", "chat.yaml", "--dry-run")
        assert planned.out.splitlines()[1:3] == ["~ environ.MODE: a -> b", "+ environ.X: y"]
        assert "makes revision 2" in planned.out
        assert (await dure.ok("apply", "-f", "chat.yaml", "-o", "json")).json["revision"] == 2
        item = fake.endpoints[CHAT]
        assert (item.replica_count, dict(item.environ)) == (5, {"MODE": "b", "X": "y"})
        manifest.write_text("name: chat\nmodel: m\nreplicas: 5\n")
        ran = await dure.ok("apply", "-f", "chat.yaml")
        assert "- environ.MODE: b" in ran.out and "- resource_slots.cpu: 1" in ran.out
        assert not fake.endpoints[CHAT].environ and not fake.endpoints[CHAT].resource_slots
        manifest.write_text("name: chat\nmodel: other\n")
        refused = await dure("apply", "-f", "chat.yaml")
        assert refused.code == 1 and "serves folder `m`, not `other`" in refused.err

    with_cli(tmp_path, body)


def test_what_get_writes_apply_reads(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(
            dure, "-e", "A=1", "--mount", "data/x:/d:rw", "--canary", "10:60s,50", "--health-path", "/u"
        )
        written = await dure.ok("endpoint", "get", "chat", "-o", "manifest")
        document = yaml.safe_load(written.out)
        assert document["rollout"]["steps"] == [{"weight": 10, "hold": "60s"}, {"weight": 50}]
        (tmp_path / "chat.yaml").write_text(written.out)
        assert "nothing to change" in (await dure.ok("apply", "-f", "chat.yaml")).out
        (tmp_path / "chat.json").write_text(json.dumps(document | {"name": "talk"}, indent="\t"))
        await dure.ok("apply", "-f", "chat.json", "-q")
        assert dict(fake.endpoints[CHAT[:-4] + "talk"].environ) == {"A": "1"}

    with_cli(tmp_path, body)


def test_apply_of_several_tells_every_problem_at_once(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("name: a\nmodel: m\n---\nname: b\nmodel: m\nreplicas: 0\n")
    (tmp_path / "bad.yaml").write_text("name: a\nmodel: m\nenvirons: {}\nresource_slots: {cpu: lots}\n")
    (tmp_path / "worse.json").write_bytes(b'{"name": "\xff"}')

    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        bad = await dure("apply", "-f", "bad.yaml", "-f", "worse.json", "-f", "two.yaml")
        assert bad.code == 1 and "3 problems" in bad.err and not fake.endpoints
        for piece in (
            "bad.yaml:3: environs: unknown key; did you mean `environ`?",
            "bad.yaml:4: resource_slots.cpu: `lots` is not an amount",
            "worse.json:1: found the byte 0xff, expected UTF-8 text",
        ):
            assert piece in bad.err
        made = await dure.ok("apply", "-f", "two.yaml")
        assert "endpoint a:" in made.out and "endpoint b created" in made.out
        assert sorted(name[-1] for name in fake.endpoints) == ["a", "b"]
        shown = (await dure.ok("apply", "-f", "two.yaml", "-o", "json")).json["endpoints"]
        assert isinstance(shown, list) and [item["name"][-1] for item in shown] == ["a", "b"]
        missing = await dure("apply", "-f", "none.yaml")
        assert missing.code == 1 and "none.yaml: No such file" in missing.err

    with_cli(tmp_path, body)


def test_a_wait_follows_the_rollout_to_its_end(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure, "--replicas", "2")
        fake.set("chat", "HEALTHY")
        update = ["endpoint", "update", "chat", "--wait", "--timeout", "20", "-e"]
        waiting = await dure.start(*update, "A=1")
        await until(lambda: fake.watches)
        fake.endpoints[CHAT].rollout.weight = 50
        fake.touch(CHAT)
        fake.set("chat", "HEALTHY")
        ran = await finish(waiting)
        assert ran.code == 0 and "revision 2 is rolled out" in ran.out
        assert "UPDATING, 2 of 2 ready, revision 1 -> 2, rolling, " in ran.err
        waiting = await dure.start(*update, "A=2")
        await until(lambda: fake.endpoints[CHAT].revision == 3 and fake.watches)
        fake.revisions[CHAT][2].reason = "exit code 3, five times"
        fake.endpoints[CHAT].revision = 2
        fake.set("chat", "HEALTHY")
        ran = await finish(waiting)
        assert ran.code == 1, ran
        assert "revision 3 of endpoint chat was not kept; now it is 2: exit code 3, five times" in ran.err
        assert "dure endpoint history chat" in ran.err
        waiting = await dure.start(*update, "A=4", "--canary", "10")
        await until(lambda: fake.endpoints[CHAT].revision == 4 and fake.watches)
        fake.endpoints[CHAT].rollout.waits = True
        fake.endpoints[CHAT].rollout.step = 1
        fake.touch(CHAT)
        ran = await finish(waiting)
        assert ran.code == 0 and "`dure endpoint rollout promote chat`" in ran.out
        status = (await dure.ok("endpoint", "rollout", "status", "chat")).out
        assert "revision 2 -> 4, canary, 0% of the requests, waits to be promoted" in status
        listed = (await dure.ok("endpoint", "list")).out
        assert "2->4 0%" in listed
        assert "paused" in (await dure.ok("endpoint", "rollout", "pause", "chat")).out
        waiting = await dure.start("endpoint", "rollout", "promote", "chat", "--wait", "--timeout", "20")
        await until(lambda: fake.endpoints[CHAT].rollout.weight == 100 and fake.watches)
        fake.set("chat", "HEALTHY")
        assert (await finish(waiting)).code == 0
        none = await dure("endpoint", "rollout", "resume", "chat")
        assert none.code == 5 and "no rollout goes on" in none.err
        assert "no rollout goes on" in (await dure.ok("endpoint", "rollout", "status", "chat")).out

    with_cli(tmp_path, body)


def test_history_and_rollback(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure, "-e", "A=1")
        await dure.ok("endpoint", "update", "chat", "-e", "A=2", "-e", "B=x")
        listed = (await dure.ok("endpoint", "history", "chat")).out.splitlines()
        assert listed[0].split() == ["REV", "STATE", "AGE", "AUTHOR", "CHANGE"]
        assert [line.split()[0] for line in listed[1:]] == ["2", "1"]
        fake.page_size_max = 1
        told = (await dure.ok("endpoint", "history", "chat", "--diff")).out
        assert "  ~ environ.A: 1 -> 2\n  + environ.B: x\nrevision 1" in told
        fake.page_size_max = 100
        document = (await dure.ok("endpoint", "history", "chat", "-o", "json")).json
        assert isinstance(document["revisions"], list) and document["revisions"][0]["number"] == 2
        one = (await dure.ok("endpoint", "history", "chat", "--revision", "1")).out
        assert "+ environ.A: 1" in one and "models: []" in one
        assert (await dure("endpoint", "history", "chat", "--revision", "9")).code == 3
        back = (await dure.ok("endpoint", "rollback", "chat")).out
        assert "~ environ.A: 2 -> 1" in back and "goes back from revision 2 to 1" in back
        assert "plan:" not in back
        assert dict(fake.endpoints[CHAT].environ) == {"A": "1"}
        await dure.ok("endpoint", "rollback", "chat", "--to", "2", "-o", "name")
        assert fake.endpoints[CHAT].revision == 2
        gone = await dure("endpoint", "rollback", "chat", "--to", "7")
        assert gone.code == 3 and "`dure endpoint history chat`" in gone.err

    with_cli(tmp_path, body)


def test_validate_streams_and_says_how_it_ended(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        validate = ["endpoint", "validate", "--model", "m", "-e", "A=1"]
        for result, health, last, code in (
            ("FINISHED", "HEALTHY", "Finished: HEALTHY", 0),
            ("FINISHED", "UNHEALTHY", "Finished: UNHEALTHY", 1),
            ("FAILED", "UNKNOWN", "Failed: the probe answered 200", 1),
            ("TIMED_OUT", "DEGRADED", "Timed out: DEGRADED", 1),
        ):
            fake.validation = pieces(result, health)
            ran = await dure(*validate)
            assert ran.code == code and ran.out.splitlines()[-1] == last, ran
            assert "REPLICA_PLACED: on agent-1" in ran.out and "main1 | loading ?[31mweights" in ran.out
        assert dict(fake.validations[0].endpoint.environ) == {"A": "1"}
        fake.validation = pieces("FINISHED", "UNKNOWN")
        dry = await dure.ok(*validate, "--dry-run", "--timeout", "9s")
        assert fake.validations[-1].dry_run and fake.validations[-1].timeout.seconds == 9
        assert dry.out.splitlines()[-1] == "Finished: the probe answered 200"
        documents = (await dure.ok(*validate, "--dry-run", "-o", "json")).out.splitlines()
        assert json.loads(documents[-1])["outcome"]["result"] == "FINISHED"
        nope = await dure("endpoint", "validate", "--model", "nope")
        assert nope.code == 3 and "`dure folder list`" in nope.err

    with_cli(tmp_path, body)


def test_leaving_a_validation_ends_its_session(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        fake.validation = pieces("FINISHED", "HEALTHY")[:1]
        process = await dure.start("endpoint", "validate", "--model", "m")
        assert process.stdout is not None
        assert b"REPLICA_PLACED" in await process.stdout.readline()
        assert fake.sessions == 1
        process.send_signal(signal.SIGINT)
        ran = await finish(process)
        assert (ran.code, ran.err.strip()) == (130, "")
        await until(lambda: fake.sessions == 0)

    with_cli(tmp_path, body)


def test_explain_and_describe(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure, "--replicas", "1", "--cluster-size", "2")
        fake.set("chat", "DEGRADED", ready=0, reason="starting")
        item = fake.endpoints[CHAT]
        item.replicas[0].kernels.add(host="main1", node="agents/agent-1", pid=7)
        item.replicas[0].kernels.add(host="sub1", node="agents/agent-2", pid=8, message="waits for main1")
        item.conditions.add(type="PORT_NOT_BOUND", message="port 7100 is taken")
        item.errors.append("exit code 3")
        described = (await dure.ok("endpoint", "get", "chat")).out
        for piece in ("Kernels", "sub1", "waits for main1", "PORT_NOT_BOUND: port", "agent-1,agent-2"):
            assert piece in described
        assert "Profile:" in described and "replicas have" not in described
        item.replicas[0].kernels[0].security_profile = endpoint_pb2.SECURITY_PROFILE_STRICT
        held_to_more = (await dure.ok("endpoint", "get", "chat")).out
        assert "default; replicas have strict" in " ".join(held_to_more.split())
        header, row = (await dure.ok("endpoint", "replicas", "chat", "-o", "wide")).out.splitlines()
        assert "PROFILE" in header.split() and "strict" in row.split()
        for piece in ("TOKEN=$(dure token create chat", "Authorization: BackendAI $TOKEN", "2 kernels"):
            assert piece in described
        fake.explanation.summary = "no node has 4 GPUs"
        fake.explanation.request = "cpu 1, 4 GPUs"
        fake.explanation.nodes.add(node="agent-1", fits=False, reason="2 GPUs free")
        fake.explanation.advice.append("ask for less")
        told = (await dure.ok("endpoint", "explain", "chat")).out
        for piece in (
            "no node has 4 GPUs",
            "a replica needs cpu 1",
            "2 GPUs free",
            "What to do",
            "  ask for",
        ):
            assert piece in told
        assert (await dure.ok("endpoint", "explain", "chat", "-o", "json")).json["nodes"]

    with_cli(tmp_path, body)


def test_events_are_followed(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure)
        events = fake.events.setdefault(CHAT, [])
        for number in range(3):
            events.insert(0, endpoint_pb2.Event(name=f"{CHAT}/events/{number}", reason=f"R{number}"))
        process = await dure.start("endpoint", "events", "chat", "-f", "-o", "json")
        assert process.stdout is not None
        first = [json.loads(await process.stdout.readline())["reason"] for _ in range(3)]
        assert first == ["R0", "R1", "R2"]
        events.insert(0, endpoint_pb2.Event(name=f"{CHAT}/events/3", reason="R3"))
        assert json.loads(await process.stdout.readline())["reason"] == "R3"
        fake.remove("chat")
        ran = await finish(process)
        assert (ran.code, ran.out) == (0, "")

    with_cli(tmp_path, body)


def test_agents_are_drained(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        agent = agent_pb2.Agent(name="agents/n1", status=agent_pb2.AGENT_STATUS_ALIVE, session_count=2)
        fake.agents.append(agent)
        assert "2 sessions to move" in (await dure.ok("agent", "drain", "n1")).out
        assert "DRAINING" in (await dure.ok("agent", "list")).out
        assert "dure agent resume" in (await dure.ok("agent", "get", "n1")).out
        waiting = await dure.start("agent", "drain", "n1", "--wait", "--timeout", "20")
        asked = fake.calls.count("GetAgent")
        await until(lambda: fake.calls.count("GetAgent") > asked)
        agent.session_count = 0
        assert "no sessions any more" in (await finish(waiting)).out
        assert "takes sessions again" in (await dure.ok("agent", "resume", "n1")).out
        assert not agent.draining
        agent.session_count = 1
        late = await dure("agent", "drain", "n1", "--wait", "--timeout", "0.2")
        assert late.code == 6 and "still has 1 session" in late.err

    with_cli(tmp_path, body)
