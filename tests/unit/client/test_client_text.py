"""What people and programs read: documents, tables, ages, expiries, verdicts."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from dure.client.cli import tables
from dure.client.cli.describe_endpoint import enforced
from dure.client.cli.failures import explain
from dure.client.cli.output import dumps, enum_word, to_value
from dure.client.cli.text import age, align, cells, clean, cut, parse_expiry, span
from dure.client.waiting import judge, summary
from dure.v1 import admin_pb2, agent_pb2, endpoint_pb2
from dure.v1.endpoint_pb2 import Replica
from dure.wire.errors import FailedPrecondition, InvalidInput, ManagerUnreachable, NotFound, Violation


def test_what_keeps_shares_is_told_with_its_reason() -> None:
    kept = Replica(uid="a-1", enforcement="watchdog")
    kept.kernels.add(enforcement="mps")
    kept.kernels.add(enforcement="watchdog", enforcement_detail="no MPS\non this GPU")
    better = Replica(uid="a-2", enforcement="mig")
    assert enforced([kept, Replica(uid="a-3"), better]) == ["1: watchdog (no MPS on this GPU)", "2: mig"]


def test_documents_hold_every_field_by_its_proto_name() -> None:
    endpoint = endpoint_pb2.Endpoint(
        name="projects/p/endpoints/e", status=endpoint_pb2.ENDPOINT_STATUS_HEALTHY
    )
    value = to_value(endpoint)
    assert list(value) == [field.name for field in endpoint.DESCRIPTOR.fields]
    assert (value["status"], value["open_to_public"], value["ready_replicas"]) == ("HEALTHY", False, 0)
    assert (value["create_time"], value["environ"], value["replicas"]) == (None, {}, [])


def test_documents_of_numbers_times_and_what_is_not_set() -> None:
    replica = endpoint_pb2.Replica(revision=2**60, status=endpoint_pb2.REPLICA_STATUS_FAILED, exit_code=0)
    replica.create_time.FromJsonString("2026-01-31T12:00:00.250Z")
    value = to_value(replica)
    assert json.loads(dumps(value, "json"))["revision"] == 2**60
    assert (value["create_time"], value["exit_code"], value["health"]) == (
        "2026-01-31T12:00:00.250Z",
        0,
        "UNSPECIFIED",
    )
    assert value["probe"] is None
    assert to_value(endpoint_pb2.Replica())["exit_code"] is None
    agent = agent_pb2.Agent()
    agent.last_heard.FromMilliseconds(1500)
    assert to_value(agent)["last_heard"] == "1.500s"
    assert "\n" not in dumps(value, "line")


def test_enum_values_lose_their_prefix_only() -> None:
    field = endpoint_pb2.Endpoint.DESCRIPTOR.fields_by_name["status"]
    assert field.enum_type is not None
    assert enum_word(field.enum_type, endpoint_pb2.ENDPOINT_STATUS_UNSPECIFIED) == "UNSPECIFIED"
    assert enum_word(field.enum_type, 99) == "99"
    role = admin_pb2.CreateJoinTokenRequest.DESCRIPTOR.fields_by_name["role"].enum_type
    assert role is not None and enum_word(role, admin_pb2.JOIN_ROLE_AGENT) == "AGENT"


def test_columns_line_up_for_wide_letters_too() -> None:
    lines = align(["NAME", "X"], [["두레", "1"], ["a", ""]])
    assert [cells(line[0]) for line in lines] == [4, 4, 4]
    assert lines[2][1] == "-"


def test_control_characters_never_reach_the_terminal() -> None:
    assert clean("a\x1b[2Jb\r\n\tc\x00") == "a?[2Jb c?"
    described = tables.endpoints([endpoint_pb2.Endpoint(name="e", status_reason="x\x1b]0;y\x07")])
    assert "\x1b" not in "".join(described.lines(color=False))


def test_a_line_is_cut_to_the_width_of_the_terminal() -> None:
    endpoint = endpoint_pb2.Endpoint(name="e", status_reason="long " * 40)
    lines = tables.endpoints([endpoint]).lines(color=False, width=80)
    assert all(cells(line) <= 80 for line in lines) and lines[1].endswith("...")
    assert cut("두레두레", 7) == "두레..."
    assert cut("abc", 3) == "abc"


def test_ages() -> None:
    assert [span(s) for s in (-5, 0, 119, 120, 7199, 7200, 172799, 172800)] == [
        *("0s", "0s", "119s", "2m", "119m", "2h", "47h", "2d"),
    ]
    created = Timestamp(seconds=1_700_000_000)
    assert age(created, datetime.fromtimestamp(1_700_000_045, UTC)) == "45s"
    assert age(Timestamp(), datetime.now(UTC)) == ""


def test_expiries() -> None:
    assert parse_expiry("1h30m") == timedelta(minutes=90)
    assert parse_expiry("7d") == timedelta(days=7)
    assert parse_expiry("2026-12-31T00:00:00+09:00") == datetime(2026, 12, 30, 15, tzinfo=UTC)
    assert parse_expiry("2026-12-31T00:00:00Z") == datetime(2026, 12, 31, tzinfo=UTC)
    for text in ("", "1x", "tomorrow", "2026-12-31", "2026-12-31T00:00:00", "999999999999w", "-1h"):
        with pytest.raises(ValueError, match="`"):
            parse_expiry(text)


def _endpoint(status: str, desired: int, ready: int, living: int) -> endpoint_pb2.Endpoint:
    endpoint = endpoint_pb2.Endpoint(
        name="projects/p/endpoints/e",
        status=endpoint_pb2.EndpointStatus.Value(f"ENDPOINT_STATUS_{status}"),
        desired_replicas=desired,
        ready_replicas=ready,
        status_reason="because",
    )
    for _ in range(living):
        endpoint.replicas.add(status=endpoint_pb2.REPLICA_STATUS_TERMINATING)
    endpoint.replicas.add(status=endpoint_pb2.REPLICA_STATUS_FAILED)
    return endpoint


@pytest.mark.parametrize(
    ("status", "desired", "ready", "living", "done"),
    [
        ("HEALTHY", 2, 2, 2, True),
        ("HEALTHY", 3, 2, 2, False),  # just scaled out: the status is from before
        ("HEALTHY", 1, 2, 2, False),  # just scaled in
        ("HEALTHY", 1, 1, 2, False),  # one is still drained
        ("DEGRADED", 2, 2, 2, False),
        ("STOPPED", 0, 0, 1, False),
        ("STOPPED", 0, 0, 0, True),
        ("IDLE", 0, 0, 0, True),
        ("PENDING", 1, 0, 0, False),
        ("UNHEALTHY", 1, 0, 1, False),
    ],
)
def test_when_a_wait_is_over(status: str, desired: int, ready: int, living: int, done: bool) -> None:
    verdict = judge(_endpoint(status, desired, ready, living))
    assert (verdict.done, verdict.failed) == (done, "")


def test_when_a_wait_is_in_vain() -> None:
    assert judge(_endpoint("BLOCKED", 1, 0, 0)).failed == "endpoint e is BLOCKED: because"
    assert "being deleted" in judge(_endpoint("TERMINATING", 1, 0, 0)).failed
    assert summary(_endpoint("PENDING", 2, 1, 0)) == "PENDING, 1 of 2 ready: because"


def test_errors_say_every_violation_and_what_to_try() -> None:
    error = InvalidInput.of([Violation("a", "wrong"), Violation("b", "bad")])
    assert explain(error, ["endpoint", "create", "x"]) == [
        "error: 2 problems with the input:",
        "  a: wrong",
        "  b: bad",
        "next: `dure endpoint create --help` says what is expected",
    ]
    assert "`dure endpoint list`" in explain(NotFound("no"), ["endpoint", "-o", "json", "get", "x"])[-1]
    assert "`dure doctor`" in explain(ManagerUnreachable("no"), ["token", "list", "x"])[-1]
    blocked = FailedPrecondition("endpoint vv is BLOCKED: why", reason="WAIT_FAILED")
    for arguments in (["model", "run", "m", "--name", "vv"], ["endpoint", "create", "--model", "m", "vv"]):
        assert "`dure endpoint events vv`" in explain(blocked, arguments)[-1]


def test_the_shares_and_probe_of_a_replica() -> None:
    replica = endpoint_pb2.Replica(uid="0199-0000-7000-8000-00000000000a")
    assert (tables.shares(replica), tables.probe(replica), tables.short_uid(replica.uid)) == (
        "",
        "",
        "00000000000a",
    )
    for amount in ("0.75", "0.75"):
        replica.devices.add(slot="cuda.shares", amount=amount)
    replica.probe.consecutive_failures = 3
    assert (tables.shares(replica), tables.probe(replica)) == ("1.50", "no answer (3 failed)")
