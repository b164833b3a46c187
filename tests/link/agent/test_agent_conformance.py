"""Our own agent is what the protocol says. Other programs: test_agent_conformance_others.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

from conformance_command import conformance, outcomes

from dure.agent.conformance.checks import CHECKS

NEVER_ON_PROCESSES = {"strict-profile", "missing-image", "image-out-of-reach"}


def test_the_process_back_end_passes_whole(tmp_path: Path) -> None:
    done = conformance(tmp_path, "--timeout", "60", "-o", "json", limit_s=280)
    found = outcomes(done)
    failed = {
        name: (check["expected"], check["seen"])
        for name, check in found.items()
        if check["outcome"] == "failed"
    }
    assert not failed and done.returncode == 0, failed
    assert [*found] == [check.name for check in CHECKS]
    passed_over = {name for name, check in found.items() if check["outcome"] == "not_applicable"}
    assert passed_over >= NEVER_ON_PROCESSES
    if os.geteuid() == 0:
        assert passed_over == NEVER_ON_PROCESSES
    assert json.loads(done.stdout)["agent"]["backend"] == "process"
