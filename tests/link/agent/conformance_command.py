"""`dure agent conformance` as a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import own_ports
from agent_fakes import processes_of


def conformance(tmp_path: Path, *arguments: str, limit_s: float = 60.0, **environ: str) -> Any:
    """Runs the command; nothing of it runs afterwards."""
    done = subprocess.run(
        [sys.executable, "-m", "dure.client.cli.main", "agent", "conformance", *arguments],
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        env={
            **os.environ,
            "TMPDIR": str(tmp_path),
            "DURE_LEASE_DIR": str(tmp_path / "leases"),
            "DURE_SESSION_PORTS": own_ports.option(own_ports.sessions()),
            **environ,
        },
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert processes_of(tmp_path) == []
    assert list(tmp_path.glob("dure-conformance-*")) == []
    return done


def outcomes(done: Any) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def only(names: Sequence[str]) -> list[str]:
    return [part for name in names for part in ("--only", name)]
