"""Two tenants on one cluster of real processes: each serves, neither sees the other, quotas hold."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from system.cluster import cluster


def test_two_tenants_share_a_cluster(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster") as running:
        running.dure("project", "create", "vision", "--quota", "cuda.shares=0.5")
        running.dure("project", "create", "speech")
        keys = {}
        for user, project in (("alice", "vision"), ("bob", "speech")):
            running.dure("user", "create", user, "--project", project, "--role", "member")
            keys[user] = running.dure("key", "create", "--user", user, "-q").strip()
            running.dure("context", "add", user, "--api-key", keys[user], "--project", project)
        running.dure("context", "use", "alice")
        running.model()
        served = running.serve("chat", 2)
        assert served["name"] == "projects/vision/endpoints/chat"
        token = running.dure("token", "create", "chat", "--expires", "1h", "-q").strip()
        request = urllib.request.Request(served["address"], headers={"Authorization": f"Bearer {token}"})

        def answers() -> bool:
            with urllib.request.urlopen(request, timeout=10) as response:
                return bool(response.status == 200 and response.read().isdigit())

        assert answers()
        over = running.dure("endpoint", "scale", "chat", "3", code=1)
        assert "other endpoints use 0.00, and this one wants 0.75 (3 replicas x 0.25)" in over
        usage = json.loads(running.dure("project", "usage", "-o", "json"))
        assert {"slot": "cuda.shares", "used": "0.50", "quota": "0.50"} in usage["slots"]

        for command in (
            ("endpoint", "get", "projects/vision/endpoints/chat"),
            ("endpoint", "list", "--project", "vision"),
            ("endpoint", "delete", "projects/vision/endpoints/chat"),
            ("endpoint", "logs", "projects/vision/endpoints/chat"),
            ("token", "list", "projects/vision/endpoints/chat"),
            ("folder", "download", "projects/vision/folders/m", str(tmp_path / "stolen")),
            ("endpoint", "create", "mine", "--model", "projects/vision/folders/m"),
            ("project", "audit", "vision"),
            ("project", "audit", "--all"),
        ):
            told = running.dure(*command, "--context", "bob", code=4)
            assert "vision` that you have a role in" in told or "--all" in command, told
        assert not list(tmp_path.glob("stolen/*"))

        # Who loses a role is out at once; what serves goes on serving.
        running.dure("project", "remove-member", "vision", "alice", "--context", "default")
        assert "no project `vision` that you have a role in" in running.dure("endpoint", "list", code=4)
        assert answers()
        trail = json.loads(running.dure("project", "audit", "vision", "-o", "json", "--context", "default"))
        told = {(each["actor"], each["method"], each["outcome"]) for each in trail["records"]}
        assert told >= {
            ("alice", "CreateEndpoint", "OK"),
            ("alice", "UpdateEndpoint", "RESOURCE_EXHAUSTED"),
            ("bob", "DeleteEndpoint", "PERMISSION_DENIED"),
            ("bob", "CreateEndpoint", "PERMISSION_DENIED"),
        }
        assert token not in json.dumps(trail) and keys["alice"] not in json.dumps(trail)
