"""The Docker back end is what the protocol says, as much as the process back end is."""

from __future__ import annotations

import json
from pathlib import Path

from conformance_command import conformance, outcomes
from containers import engines

from dure.agent.conformance.checks import CHECKS

# A session in an image has a command of its own, and can be strict.
NEVER_IN_CONTAINERS = {"no-command", "strict-is-not-left-out"}


def test_the_docker_back_end_passes_whole(tmp_path: Path) -> None:
    image = engines.provide()
    done = conformance(
        tmp_path, "--backend", "docker", "--image", image, "--timeout", "90", "-o", "json", limit_s=400
    )
    found = outcomes(done)
    failed = {
        name: (check["expected"], check["seen"])
        for name, check in found.items()
        if check["outcome"] == "failed"
    }
    assert not failed and done.returncode == 0, failed
    assert [*found] == [check.name for check in CHECKS]
    passed_over = {name for name, check in found.items() if check["outcome"] == "not_applicable"}
    assert passed_over == NEVER_IN_CONTAINERS
    assert json.loads(done.stdout)["agent"]["backend"] == "docker"
