"""Templates, outcomes, grants, reports, environment: small functions of values."""

from __future__ import annotations

from pathlib import Path

from dure.agent import devices, environment
from dure.agent.accelerators import device
from dure.agent.backends import outcome
from dure.agent.folders import content_digest
from dure.agent.link import REPORT_BYTES_MAX, reports
from dure.agent.shim.templates import fill
from dure.fleet.v1 import fleet_pb2


def test_templates_replace_only_what_is_known() -> None:
    values = {"model_path": "/models", "port": "20001", "out": "{port}", "out.err": "oops"}
    assert fill("{model_path}:{port}", values) == "/models:20001"
    assert fill("awk '{print $1}' {\"a\": {port}} ${port} {unknown} {}", values) == (
        "awk '{print $1}' {\"a\": 20001} ${port} {unknown} {}"
    )
    assert fill("{out}{out.err}{out.out}", values) == "{port}oops{out.out}"


def test_reports_are_cut_and_the_last_is_marked() -> None:
    long = fleet_pb2.KernelExit(log_tail="x" * 4096)
    statuses = [fleet_pb2.KernelStatus(uid=str(n), exit=long) for n in range(600)]
    pieces = list(reports(statuses, complete=True))
    assert all(
        len(piece.kernels) <= 256 and piece.ByteSize() <= REPORT_BYTES_MAX + 10_000 for piece in pieces
    )
    assert [piece.complete for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [status.uid for piece in pieces for status in piece.kernels] == [str(n) for n in range(600)]
    assert [piece.complete for piece in reports([], complete=True)] == [True]
    assert list(reports([], complete=False)) == []


def grant(amount: int, slot: str = "cuda.shares", of: str = "GPU-0") -> fleet_pb2.DeviceGrant:
    return fleet_pb2.DeviceGrant(device=of, slot=slot, amount=amount)


def test_grants() -> None:
    known = {"GPU-0": device("GPU-0", "m", 1, "cuda")}
    assert devices.refusal([grant(1000)], known, []) == ""
    assert devices.refusal([grant(500)], known, [[grant(500)]]) == ""
    assert "0.51 more do not fit" in devices.refusal([grant(510)], known, [[grant(300)], [grant(200)]])
    assert "more do not fit" in devices.refusal([grant(600), grant(600)], known, [])
    assert "exclude each other" in devices.refusal([grant(1000, "cuda.device")], known, [[grant(10)]])
    assert "not on this node; its devices: GPU-0" in devices.refusal([grant(10, of="GPU-1")], known, [])
    assert "does not offer" in devices.refusal([grant(10, "tpu")], known, [])
    assert "is nothing" in devices.refusal([grant(0)], known, [])


def test_environment_precedence() -> None:
    known = {"GPU-0": device("GPU-0", "H100", 1, "cuda"), "GPU-1": device("GPU-1", "H100", 1, "cuda")}
    spec = fleet_pb2.KernelSpec(
        uid="k",
        session_uid="s",
        replica_uid="r",
        environ={"PORT": "1", "DURE_AGENT": "x", "N_GPUS": "7", "CUDA_VISIBLE_DEVICES": "0,1", "MINE": "yes"},
        devices=[grant(500, of="GPU-1")],
        model_name="demo",
    )
    inherited = {"PATH": "/bin", "DURE_JOIN_TOKEN": "secret", "AWS_SECRET": "secret"}

    def built(of: fleet_pb2.KernelSpec) -> dict[str, str]:
        return environment.build(
            of, agent="node", port=20001, model_place="/models", devices=known, inherited=inherited
        )

    env = built(spec)
    assert (env["PORT"], env["DURE_AGENT"], env["N_GPUS"], env["MINE"]) == ("20001", "node", "7", "yes")
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-1" and env["GPU_MODEL_NAME"] == "H100"
    assert env["BACKENDAI_CLUSTER_HOST"] == "main1" and env["BACKENDAI_CLUSTER_REPLICAS"] == "main:1"
    assert "secret" not in env.values()
    spec.devices.clear()
    assert built(spec)["CUDA_VISIBLE_DEVICES"] == ""


def test_outcomes() -> None:
    base = {"stage": "command", "signal": 0, "code": 0, "oom": False, "stopped": False, "message": ""}
    assert outcome.read(base).reason == "EXITED" and "foreground" in outcome.read(base).message
    assert outcome.read({**base, "signal": 9, "code": 137}).reason == "SIGNALED"
    assert outcome.read({**base, "signal": 9, "code": 137, "oom": True}).reason == "OOM"
    # A child was killed for its memory, and its parent gave up.
    assert outcome.read({**base, "code": 1, "oom": True}).reason == "OOM"
    assert outcome.read({**base, "stage": "setup", "code": 127, "message": "no"}).reason == "START_FAILED"
    assert outcome.read({**base, "stage": "action", "code": 127, "message": "no"}).reason == "ACTION_FAILED"


def test_a_tail_of_bytes_that_are_no_text_stays_bounded(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\xff" * 10_000)
    assert len(outcome.log_tail(tmp_path, 4096).encode()) <= 4096
    assert outcome.log_tail(tmp_path / "nowhere", 4096) == ""


def test_a_digest_names_content_not_order() -> None:
    a = fleet_pb2.ManifestFile(path="a", size_bytes=1, sha256="1" * 64)
    b = fleet_pb2.ManifestFile(path="b", size_bytes=2, sha256="2" * 64)
    assert content_digest([a, b]) == content_digest([b, a])
    assert content_digest([a]) != content_digest([b])
