"""The main job, through the command line, as its users run it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from system.cluster import Cluster, cluster, until


def answer(address: str, token: str = "", scheme: str = "BackendAI") -> tuple[int, str]:
    request = urllib.request.Request(address)
    if token:
        request.add_header("Authorization", f"{scheme} {token}")
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["error"]["code"]


def test_from_a_folder_to_an_answer_and_away_again(tmp_path: Path) -> None:
    with cluster(tmp_path / "d") as dure:
        dure.model()
        endpoint = dure.serve("e", 2)
        assert endpoint["status"] == "HEALTHY"
        assert len(endpoint["replicas"]) == endpoint["ready_replicas"] == 2
        for replica in endpoint["replicas"]:
            assert replica["health"] == "HEALTHY"
            assert replica["node"] == "agent-1"
            assert replica["session"]
            assert [(d["slot"], d["amount"]) for d in replica["devices"]] == [("cuda.shares", "0.25")]
        address = endpoint["address"]

        token = dure.dure("token", "create", "e", "--expires", "1h", "-q").strip()
        assert answer(address, token)[0] == 200
        assert answer(address, token, "Bearer")[0] == 200
        assert answer(address) == (401, "token_missing")
        assert answer(address, token[:-4] + "AAAA")[0] == 401
        other = dure.serve("other", 1)
        assert answer(other["address"], token) == (403, "token_other_endpoint")

        pids = {answer(address, token)[1] for _ in range(20)}
        assert pids == {str(replica["pid"]) for replica in endpoint["replicas"]}, "both replicas serve"

        listed = json.loads(dure.dure("token", "list", "e", "-o", "json"))["tokens"]
        dure.dure("token", "revoke", "e", listed[0]["uid"])
        until(lambda: answer(address, token) == (401, "token_revoked"), 1.0, "the revocation binds")

        dure.dure("endpoint", "scale", "e", "0")
        fresh = dure.dure("token", "create", "e", "--expires", "1h", "-q").strip()
        until(lambda: answer(address, fresh) == (503, "stopped"), 10, "it is stopped")
        dure.dure("endpoint", "scale", "e", "1", "--wait", "--timeout", "30")
        assert answer(address, fresh)[0] == 200
        assert dure.get("e")["address"] == address
        dure.dure("endpoint", "delete", "e", "--wait")
        dure.dure("endpoint", "get", "e", code=3)

        # Reflection and health need no key.
        grpcurl = Path(sys.executable).parent / "grpcurl"
        manager = json.loads(dure.dure("context", "show", "-o", "json"))["manager"]
        listing = subprocess.run(
            [grpcurl, "-plaintext", manager, "list"], capture_output=True, text=True, timeout=20, check=True
        )
        assert "dure.v1.EndpointService" in listing.stdout


def test_nonsense_is_answered_at_once(dure: Cluster) -> None:
    dure.model("plain")
    bad = dure.dure(
        *("endpoint", "create", "a b", "--model", "plain", "-r", "cuda.shares=0.333", "-r", "gpu=1"), code=1
    )
    assert "`a b` is not a name" in bad
    assert "0.33 and 0.34" in bad
    assert "unknown slot `gpu`" in bad
    assert "nowhere" in dure.dure("endpoint", "create", "x", "--model", "nowhere", code=3)
    dure.model("broken", "models:\n- name: x\n  model_path: /models\n  service: {start_comand: y}\n")
    broken = dure.dure("endpoint", "create", "x", "--model", "broken", code=1)
    assert "model-definition.yaml:4" in broken
    assert "did you mean `start_command`" in broken
    assert "port" in broken

    dure.dure("endpoint", "create", "big", "--model", "plain", "-r", "cuda.shares=64", "-r", "cpu=900")
    reason = until(
        lambda: (found := dure.get("big"))["status"] == "PENDING" and found["status_reason"],
        10,
        "PENDING",
    )
    assert "agent-1" in reason
    assert "64.00 wanted" in reason
    dure.dure("endpoint", "create", "big", "--model", "plain", code=5)
    dure.dure("endpoint", "wait", "big", "--timeout", "1", code=6)
    dure.dure("folder", "delete", "plain", code=5)
    dure.dure("endpoint", "delete", "big", "--wait")
