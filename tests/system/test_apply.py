"""An endpoint as a file, from its first plan over revisions to its end, as a pipeline does it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from system.cluster import DURE, HELLO, Cluster

MANIFEST = """\
name: filed
model: filed
replicas: 1
open_to_public: true
environ: {MODE: a, OLD: x}
resource_slots: {cpu: 0.1, mem: 64m}
"""


def test_a_file_is_applied_again_and_again(dure: Cluster, tmp_path: Path) -> None:
    dure.model("filed", HELLO)
    path = tmp_path / "filed.yaml"

    def apply(text: str, *options: str) -> str:
        path.write_text(text)
        return dure.dure("apply", "-f", str(path), *options)

    def uids() -> set[Any]:
        return {replica["uid"] for replica in dure.get("filed")["replicas"]}

    # A dry run of a new one makes nothing.
    assert "a new endpoint with 1 replica" in apply(MANIFEST, "--dry-run")
    dure.dure("endpoint", "get", "filed", code=3)
    assert "created" in apply(MANIFEST, "--wait", "--timeout", "60")
    before = uids()
    assert "nothing to change" in apply(MANIFEST)
    assert (uids(), dure.get("filed")["revision"]) == (before, 1)

    # A diff as the plan says, and nothing else until it is applied.
    changed = MANIFEST.replace("MODE: a, OLD: x", "MODE: b, NEW: y")
    plan = apply(changed, "--dry-run")
    for line in ("~ environ.MODE: a -> b", "- environ.OLD: x", "+ environ.NEW: y", "makes revision 2"):
        assert line in plan, plan
    assert dure.get("filed")["environ"] == {"MODE": "a", "OLD": "x"}
    apply(changed, "--wait", "--timeout", "60")
    endpoint = dure.get("filed")
    assert (endpoint["revision"], endpoint["environ"]) == (2, {"MODE": "b", "NEW": "y"})
    assert not uids() & before

    # What does not shape a replica replaces none.
    before = uids()
    plan = apply(changed.replace("true", "false") + "priority: 30\n")
    assert "no new revision" in plan and uids() == before
    assert dure.get("filed")["open_to_public"] is False

    # What `get` writes says the same.
    manifest = dure.dure("endpoint", "get", "filed", "-o", "manifest")
    assert "nothing to change" in apply(manifest)

    # Every mistake of a file at once, with its line, and nothing is changed.
    path.write_text("name: filed\nmodle: filed\nreplicas: many\nenviron: [a]\nhealth: x\n")
    told = dure.dure("apply", "-f", str(path), code=1)
    for wanted in (f"{path}:2", "did you mean `model`", "replicas", "environ", "health"):
        assert wanted in told, told
    assert dure.get("filed")["revision"] == 2

    # Revisions are listed, and gone back to.
    history = json.loads(dure.dure("endpoint", "history", "filed", "-o", "json"))["revisions"]
    assert {revision["number"]: revision["state"] for revision in history} == {1: "REPLACED", 2: "CURRENT"}
    dure.dure("endpoint", "rollback", "filed", "--to", "1", "--wait", "--timeout", "60")
    assert dure.get("filed")["environ"] == {"MODE": "a", "OLD": "x"}

    # And from stdin, as a pipe.
    piped = subprocess.run(
        [*DURE, "apply", "-f", "-"],
        env=dure.environ,
        input=MANIFEST.replace("replicas: 1", "replicas: 2"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert piped.returncode == 0 and "replicas 1 -> 2" in piped.stdout, piped
    dure.dure("endpoint", "wait", "filed", "--timeout", "60")
    assert len(uids()) == 2
    dure.dure("endpoint", "delete", "filed", "--wait")
    dure.dure("folder", "delete", "filed")


def test_validation_and_explanation_by_command(dure: Cluster) -> None:
    dure.model("tried", HELLO)
    slots = ("--model", "tried", "-r", "cpu=0.1", "-r", "mem=64m")
    done = dure.dure("endpoint", "validate", *slots)
    assert done.splitlines()[-1].startswith("Finished: HEALTHY")
    assert "validation" not in dure.dure("endpoint", "list")
    dry = dure.dure("endpoint", "validate", *slots, "--dry-run")
    assert dry.splitlines()[-1].startswith("Finished") and "would start on agent-" in dry
    bad = dure.told("endpoint", "validate", *slots, "--", "sh", "-c", "echo no weights; exit 5")
    assert "no weights" in bad and "exited with code 5" in bad

    dure.dure("endpoint", "create", "huge", "--model", "tried", "-r", "cpu=900", "-r", "mem=64m")
    why = dure.dure("endpoint", "explain", "huge")
    assert "agent-1" in why and "agent-2" in why and "cpu" in why
    assert "PENDING" in dure.dure("endpoint", "get", "huge")
    dure.dure("endpoint", "delete", "huge", "--wait")
    dure.dure("folder", "delete", "tried")
