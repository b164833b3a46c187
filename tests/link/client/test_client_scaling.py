"""Scaling from the command line and the library: rules, explanations, files, recordings, `dure top`."""

from __future__ import annotations

import asyncio
import json
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from link.client.dure_program import CREATE, Dure, finish, with_cli
from link.client.fake_manager import KEY, FakeManager, fake_manager, until

from dure.client.cli.rule import rule
from dure.client.client import Client
from dure.v1 import agent_pb2, folder_pb2, scaling_pb2
from dure.v1.scaling_pb2 import EndpointMeasurements, Metric, NodeMeasurements, RuleVerdict, ScalingDecision
from dure.wire.errors import InvalidInput, NotFound

CHAT = "projects/default/endpoints/chat"
BUSY = ["--source", "proxy", "--metric", "concurrency", "--above", "8", "--step", "2"]


async def chat(dure: Dure, *arguments: str) -> None:
    await dure.ok("folder", "create", "m", "--usage", "model")
    await dure.ok(*CREATE, *arguments)


def names_of(fake: FakeManager) -> list[str]:
    return list(fake.rules.get(CHAT, {}))


def test_rules_are_made_shown_changed_and_removed(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure)
        assert "No rules" in (await dure.ok("rule", "list", "chat")).err
        ran = await dure.ok("rule", "add", "chat", *BUSY, "--cooldown", "30s", "--name", "busy")
        assert "rule busy of endpoint chat made: proxy concurrency > 8" in ran.out and not ran.err
        line = (
            "rule add chat --source kernel --metric cpu_util --at-most 20.0 --step -1 "
            "--window 1m --min 2 --max 5 --clamp --disabled"
        )
        await dure.ok(*line.split())
        busy, calm = fake.rules[CHAT].values()
        assert (busy.type, busy.step_size, busy.threshold) == (scaling_pb2.SCALING_TYPE_SCALE_UP, 2, "8")
        assert busy.cooldown.seconds == 30
        assert (calm.type, calm.step_size) == (scaling_pb2.SCALING_TYPE_SCALE_DOWN, 1)
        assert calm.comparator == scaling_pb2.COMPARATOR_LESS_THAN_OR_EQUAL and calm.threshold == "20"
        assert (calm.window.seconds, calm.min_replicas, calm.max_replicas) == (60, 2, 5)
        assert calm.clamp and not calm.enabled
        rows = [line.split() for line in (await dure.ok("rule", "list", "chat")).out.splitlines()]
        assert rows[1][:9] == ["busy", "up", "proxy", "concurrency", ">", "8", "+2", "1", "10"]
        assert rows[2][0] == "rule-1" and "switched off" in " ".join(rows[2])
        document = (await dure.ok("rule", "list", "chat", "-o", "json")).json
        assert [rule["type"] for rule in document["rules"]] == ["SCALE_UP", "SCALE_DOWN"]  # type: ignore[attr-defined]
        assert "scale down" in (await dure.ok("rule", "get", "chat", "rule-1")).out
        await dure.ok("rule", "update", "chat", "busy", "--below", "3", "--type", "down", "--enabled")
        assert sorted(fake.rule_updates[0]) == ["comparator", "enabled", "threshold", "type"]
        assert (busy.type, busy.threshold) == (scaling_pb2.SCALING_TYPE_SCALE_DOWN, "3")
        await dure.ok("rule", "remove", "chat", "busy")
        assert names_of(fake) == ["rule-1"]
        await dure.ok("rule", "remove", "chat", "--all")
        assert names_of(fake) == []

    with_cli(tmp_path, body)


def test_a_rule_that_cannot_be_is_refused_before_any_call() -> None:
    for arguments, words in (
        ("--metric x --above 1", "a rule needs --source"),
        ("--source proxy --metric x", "a rule needs a condition"),
        ("--source proxy --metric x --above 1 --below 2", "--above and --below exclude each other"),
        ("--source proxy --metric x --above 1 --threshold 2", "say: leave these out"),
        ("--source proxy --metric x --comparator GREATER_THAN", "needs a --threshold"),
        ("--source proxy --metric x --above many", "`many` is no number"),
        ("--source proxy --metric x --above 1 --step 0", "--step 0 changes nothing"),
        ("--source proxy --metric x --above 1 --type sideways", "write up or down"),
        ("--source proxy --metric x --above 1 --cooldown soon", "is not a duration"),
        ("--source gpu --metric x --above 1", "'gpu' is not one of"),
    ):
        ran = CliRunner().invoke(rule, ["add", "chat", *arguments.split()])
        assert (ran.exit_code, words in ran.output) == (2, True), ran.output


def test_what_is_wrong_with_a_rule_is_told(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure)
        ran = await dure("rule", "add", "chat", *BUSY, "--min", "5", "--max", "3")
        assert ran.code == 1 and "rule.min_replicas: is above max_replicas" in ran.err
        ran = await dure.ok(
            "rule", "add", "chat", "--source", "proxy", "--metric", "concurency", "--above", "1"
        )
        assert "warning: no metric `concurency` was seen; known: requests_per_second" in ran.err
        ran = await dure("rule", "add", "chat", "--name", "rule-1", *BUSY)
        assert ran.code == 5 and "`dure rule list chat`" in ran.err
        ran = await dure("rule", "get", "chat", "none")
        assert ran.code == 3 and "`dure rule list chat`" in ran.err
        ran = await dure("rule", "list", "none")
        assert ran.code == 3 and "`dure endpoint list`" in ran.err
        ran = await dure("rule", "update", "chat", "rule-1")
        assert ran.code == 2 and "nothing to change" in ran.err
        assert (await dure("rule", "remove", "chat")).code == 2

    with_cli(tmp_path, body)


def test_the_library(tmp_path: Path) -> None:
    async def run() -> None:
        async with asyncio.timeout(20), fake_manager() as fake, Client(fake.address, KEY) as client:
            await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
            await client.endpoints.create("chat", model="m", scale_to_zero_after=timedelta(minutes=5))
            assert fake.endpoints[CHAT].scale_to_zero_after.seconds == 300
            await client.endpoints.update("chat", scale_to_zero_after=0, metrics_path="/stats")
            assert not fake.endpoints[CHAT].HasField("scale_to_zero_after")
            assert fake.endpoints[CHAT].metrics_path == "/stats"
            kept = await client.rules.add("chat", source="proxy", metric="queue", above=1)
            assert (kept.rule.name, kept.rule.step_size) == (f"{CHAT}/rules/rule-1", 1)
            kept = await client.rules.add("chat", "odd", source="proxy", metric="odd", at_least="0.5")
            assert len(kept.warnings) == 1
            fake.page_size_max = 1
            assert [rule.metric_name async for rule in client.rules.list("chat")] == ["queue", "odd"]
            kept = await client.rules.update("chat", "odd", step=-3, window=2.5)
            assert kept.rule.type == scaling_pb2.SCALING_TYPE_SCALE_DOWN
            assert kept.rule.window.ToMilliseconds() == 2500 and kept.rule.threshold == "0.5"
            assert (await client.rules.get("chat", kept.rule.name)).step_size == 3
            with pytest.raises(InvalidInput, match="threshold"):
                await client.rules.add("chat", source="proxy", metric="queue")
            await client.rules.remove("chat", "odd")
            with pytest.raises(NotFound):
                await client.rules.get("chat", "odd")
            fake.unavailable = ["GetMeasurements", "ExplainScaling"]
            fake.measurements.endpoints.add(endpoint=CHAT, concurrency=3)
            assert (await client.measurements()).endpoints[0].concurrency == 3
            assert (await client.rules.explain("chat")).decisions == []

    asyncio.run(run())


def explained(fake: FakeManager) -> None:
    answer = fake.scaling
    answer.summary = "3 replicas: busy fired 12 s ago"
    answer.newest.verdicts.extend(
        [
            RuleVerdict(rule="busy", value="9.33333333", reason="it cools down\x1b[31m for another 18 s"),
            RuleVerdict(rule="calm", value="", reason="no value of concurrency (proxy) yet"),
        ]
    )
    for number in range(30):
        decision = ScalingDecision(
            from_replicas=number, to_replicas=number + 1, cause="busy", reason=f"step {number}"
        )
        decision.time.GetCurrentTime()
        answer.decisions.append(decision)
    source = scaling_pb2.METRIC_SOURCE_INFERENCE_FRAMEWORK
    answer.metrics.extend(Metric(source=source, name=f"vllm:m{n:03}", value=n) for n in range(60))
    answer.metrics.append(Metric(source=scaling_pb2.METRIC_SOURCE_PROXY, name="concurrency", value=9.25))


def test_explain_says_what_rules_see_and_decided(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure)
        await dure.ok("rule", "add", "chat", "--name", "busy", *BUSY)
        explained(fake)
        for arguments in (("rule", "explain", "chat"), ("endpoint", "explain", "chat", "--scaling")):
            page = (await dure.ok(*arguments)).out
            lines = page.splitlines()
            assert lines[0] == "3 replicas: busy fired 12 s ago"
            [busy] = [line for line in lines if line.strip().startswith("busy")]
            assert busy.split()[:8] == ["busy", "no", "9.333", "proxy", "concurrency", ">", "8", "+2"]
            assert "it cools down?[31m for another" in page
            # There is no such rule any more.
            assert "calm" not in page
            assert "step 9" in page and "step 10" not in page
            # What rules use is shown although 60 others come before it.
            assert "9.25" in page and "and 21 more: -o wide shows them all" in page
        assert "vllm:m059" in (await dure.ok("rule", "explain", "chat", "-o", "wide")).out
        document: Any = (await dure.ok("rule", "explain", "chat", "-o", "json", "--decisions", "2")).json
        assert [one["reason"] for one in document["decisions"]] == ["step 0", "step 1"]
        assert document["newest"]["verdicts"][0]["value"] == "9.33333333"

    with_cli(tmp_path, body)


def test_explain_goes_on_when_a_verdict_changes(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure)
        explained(fake)
        process = await dure.start("rule", "explain", "chat", "-w", "-o", "json")
        assert process.stdout is not None
        first = json.loads(await process.stdout.readline())
        looked = len(fake.calls)
        fake.scaling.newest.verdicts[0].value = "7"
        await until(lambda: fake.calls[looked:].count("ExplainScaling") > 1)
        fake.scaling.newest.verdicts[0].fired = True
        second = json.loads(await process.stdout.readline())
        assert [one["newest"]["verdicts"][0]["fired"] for one in (first, second)] == [False, True]
        process.send_signal(signal.SIGINT)
        assert (await finish(process)).code == 130

    with_cli(tmp_path, body)


FILE = """
name: chat
model: m
resource_slots: {cpu: 1, mem: 1g, cuda.shares: 0.25}
scale_to_zero_after: 10m
scaling:
  - {name: busy, source: proxy, metric: concurrency, above: 8, step: 2}
  - {name: calm, source: proxy, metric: concurrency, below: 2, step: -1, window: 60s}
"""


def test_apply_makes_the_rules_those_of_the_file(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        path = tmp_path / "chat.yaml"
        path.write_text(FILE)
        ran = await dure.ok("apply", "-f", "chat.yaml", "--dry-run")
        assert "+ scaling.busy: proxy concurrency > 8: +2, within 1 to 10, cooldown 300s" in ran.out
        assert "plan: a new endpoint with 1 replica; 2 scaling rules changed" in ran.out
        assert not fake.endpoints and not fake.rules
        await dure.ok("apply", "-f", "chat.yaml")
        assert names_of(fake) == ["busy", "calm"]
        assert fake.endpoints[CHAT].scale_to_zero_after.seconds == 600
        calls = len(fake.calls)
        ran = await dure.ok("apply", "-f", "chat.yaml")
        assert "nothing to change" in ran.out and "is as the file says" in ran.out
        assert not [call for call in fake.calls[calls:] if "ScalingRule" in call and "List" not in call]
        # What the command line shows is what the file says.
        shown = yaml.safe_load((await dure.ok("endpoint", "get", "chat", "-o", "manifest")).out)
        asked = yaml.safe_load(FILE)["scaling"]
        assert shown["scaling"] == [{**asked[0], "type": "up"}, {**asked[1], "type": "down", "step": 1}]
        assert shown["scale_to_zero_after"] == "600s"
        path.write_text(
            FILE.replace("above: 8", "above: 9")
            .replace("name: calm", "name: idle")
            .replace("metric: concurrency, below", "metric: odd, below")
        )
        ran = await dure.ok("apply", "-f", "chat.yaml")
        for line in (
            "- scaling.calm: proxy concurrency < 2: -1, within 0 to 10, cooldown 300s, window 60s",
            "~ scaling.busy.above: 8 -> 9",
            "plan: 3 scaling rules changed",
            "endpoint chat changed",
        ):
            assert line in ran.out.splitlines(), ran.out
        assert "warning: rule idle: no metric `odd` was seen" in ran.err
        assert names_of(fake) == ["busy", "idle"] and fake.rules[CHAT]["busy"].threshold == "9"
        path.write_text(FILE.split("scaling:")[0])
        await dure.ok("apply", "-f", "chat.yaml")
        assert names_of(fake) == ["busy", "idle"]
        path.write_text(FILE.split("scaling:")[0] + "scaling: []\n")
        await dure.ok("apply", "-f", "chat.yaml")
        assert names_of(fake) == []

    with_cli(tmp_path, body)


def test_zero_and_the_metrics_path_by_options(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure, "--scale-to-zero-after", "5m", "--metrics-path", "/stats")
        item = fake.endpoints[CHAT]
        assert (item.scale_to_zero_after.seconds, item.metrics_path) == (300, "/stats")
        shown = (await dure.ok("endpoint", "get", "chat")).out
        assert "To zero after:  300s" in shown and "Metrics at:     /stats" in shown
        ran = await dure.ok("endpoint", "update", "chat", "--scale-to-zero-after", "0")
        assert "- scale_to_zero_after: 300s" in ran.out and "no new revision" in ran.out
        assert not item.HasField("scale_to_zero_after") and item.metrics_path == "/stats"
        await dure.ok("endpoint", "update", "chat", "--scale-to-zero-after", "1h")
        await dure.ok("endpoint", "update", "chat", "--reset", "scale-to-zero", "--reset", "metrics-path")
        assert not item.HasField("scale_to_zero_after") and not item.metrics_path

    with_cli(tmp_path, body)


def busy_cluster(fake: FakeManager) -> None:
    fake.measurements.endpoints.extend(
        [
            EndpointMeasurements(
                endpoint=CHAT,
                requests_per_second=123.4,
                concurrency=6,
                queue=2,
                latency_p50_ms=35,
                latency_p95_ms=1234,
                error_rate=0.015,
            ),
            EndpointMeasurements(endpoint="projects/default/endpoints/idle"),
        ]
    )
    fake.measurements.nodes.append(NodeMeasurements(agent="agents/agent-1", cpu_used=1.25, mem=3 << 30))
    agent = agent_pb2.Agent(name="agents/agent-1", status=agent_pb2.AGENT_STATUS_ALIVE, session_count=3)
    agent.slots.add(slot="cpu", capacity="8", used="4")
    agent.slots.add(slot="mem", capacity=str(16 << 30), used=str(8 << 30))
    agent.slots.add(slot="cuda.shares", capacity="2.00", used="0.75")
    fake.agents.append(agent)


def test_top_shows_the_busiest_first(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure)
        await dure.ok(*("idle" if word == "chat" else word for word in CREATE))
        await dure.ok(*("absent" if word == "chat" else word for word in CREATE))
        busy_cluster(fake)
        fake.set("chat", "HEALTHY")
        page = (await dure.ok("top")).out.splitlines()
        address = "http://127.0.0.1:7100"
        assert page[1].split() == [
            *("chat", "HEALTHY", "1/1", "123", "6", "2", "35ms", "1.23s", "1.5", address)
        ]
        assert [line.split()[0] for line in page[1:4]] == ["chat", "absent", "idle"]
        assert page[2].split()[3:9] == ["-"] * 6 and page[3].split()[3:6] == ["0", "0", "0"]
        assert page[-1].split() == [
            "agent-1",
            "ALIVE",
            "1.25/8",
            *("3", "GiB/16", "GiB", "-", "0.75/2.00", "3"),
        ]
        document: Any = (await dure.ok("top", "-o", "json", "--once")).json
        assert document["endpoints"][0]["name"] == CHAT
        assert document["endpoints"][0]["measured"]["latency_p95_ms"] == 1234
        assert document["endpoints"][1]["measured"] is None
        assert document["nodes"][0]["measured"]["cpu_used"] == 1.25
        process = await dure.start("top", "-w", "-o", "json")
        assert process.stdout is not None
        for _ in range(2):
            assert len(json.loads(await process.stdout.readline())["endpoints"]) == 3
        process.send_signal(signal.SIGINT)
        assert (await finish(process)).code == 130
        assert (await dure("top", "-w", "--once")).code == 2

    with_cli(tmp_path, body)


def test_lists_gain_what_is_measured(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure)
        busy_cluster(fake)
        header, row = (await dure.ok("endpoint", "list", "-o", "wide")).out.splitlines()
        assert header.split()[7:9] == ["RPS", "P95"] and row.split()[7:9] == ["123", "1.23s"]
        assert "RPS" in (await dure.ok("endpoint", "get", "chat", "-o", "wide")).out
        shown = (await dure.ok("endpoint", "get", "chat")).out
        assert "123 requests/s, 6 under way, 2 waiting, p95 1.23s, 1.5% errors" in shown
        # A list does not fail for what cannot be measured; after two seconds the columns stay empty.
        fake.unavailable = ["GetMeasurements"] * 100
        _, row = (await dure.ok("endpoint", "list", "-o", "wide")).out.splitlines()
        assert row.split()[7:9] == ["-", "-"]

    with_cli(tmp_path, body)


def test_record_and_simulate(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await chat(dure)
        await dure.ok("rule", "add", "chat", "--name", "busy", *BUSY, "--cooldown", "1s")
        busy_cluster(fake)
        fake.measurements.endpoints[0].concurrency = 20
        fake.scaling.metrics.add(source=scaling_pb2.METRIC_SOURCE_PROXY, name="concurrency", value=20)
        fake.scaling.metrics.add(source=scaling_pb2.METRIC_SOURCE_KERNEL, name="mem", value=1)
        ran = await dure.ok("rule", "record", "chat", "--for", "1500ms")
        (tmp_path / "chat.yaml").write_text(ran.out)
        assert set(yaml.safe_load(ran.out)["series"]) == {"proxy/concurrency"}
        document: Any = (await dure.ok("rule", "simulate", "chat.yaml", "-o", "json")).json
        # 20 on one replica is above 8, on three it is not.
        changes = [(one["from_replicas"], one["to_replicas"]) for one in document["decisions"]]
        assert changes == [(1, 3)] and document["seconds"] == 2
        page = (await dure.ok("rule", "simulate", "chat.yaml")).out
        assert (
            "1 decision in 2 s: from 1 to 3 replicas" in page and "proxy/concurrency of each replica" in page
        )
        await dure.ok("rule", "update", "chat", "busy", "--above", "30")
        ran = await dure.ok("rule", "simulate", "chat.yaml", "--rules-of", "chat", "--no-plot")
        assert "0 decisions in 2 s" in ran.out and "busy: concurrency is 20, not > 30" in ran.out
        looked = len(fake.calls)
        process = await dure.start("rule", "record", "chat", "--for", "1h", "--all")
        await until(lambda: fake.calls[looked:].count("GetMeasurements") > 1)
        process.send_signal(signal.SIGINT)
        ended = await finish(process)
        assert ended.code == 0 and set(yaml.safe_load(ended.out)["series"]) == {
            *("kernel/mem", "proxy/concurrency")
        }

    with_cli(tmp_path, body)


def test_simulate_needs_no_manager_and_tells_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "lone").mkdir()

    async def run() -> None:
        async with asyncio.timeout(20):
            dure = Dure(tmp_path / "none.toml", tmp_path / "lone")
            (tmp_path / "lone" / "q.csv").write_text("0,1\n10,9\n")
            file = tmp_path / "lone" / "f.yaml"
            file.write_text(
                "rules: [{source: proxy, metric: queue, above: 5, step: 3}]\nseries: {queue: q.csv}\n"
            )
            document: Any = (await dure.ok("rule", "simulate", str(file), "-o", "json")).json
            assert document["decisions"][0]["second"] == 10 and document["final_replicas"] == 4
            file.write_text("rules: [{metric: queue}]\nseries: {queue: gone.csv}\n")
            ran = await dure("rule", "simulate", str(file))
            assert ran.code == 1 and "gone.csv: No such file" in ran.err and "docs/scaling.md" in ran.err
            assert (await dure("rule", "simulate", "none.yaml")).code == 1

    asyncio.run(run())
