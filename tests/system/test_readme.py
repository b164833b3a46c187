"""The first ten minutes of the README, as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from system.cluster import Cluster

README = Path(__file__).resolve().parents[2] / "README.md"
# Stands in for Debian's jq, which need not be here.
JQ = f"""#!{sys.executable}
import json, sys
assert sys.argv[1:] == ["-r", ".address"]
print(json.load(sys.stdin)["address"])
"""


def test_the_first_ten_minutes(dure: Cluster, tmp_path: Path) -> None:
    section = README.read_text().split("## The first ten minutes")[1].split("\nFrom Python")[0]
    blocks = [
        block for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) if "dure dev" not in block
    ]
    assert len(blocks) >= 4
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "jq").write_text(JQ)
    (programs / "dure").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m dure.client.cli.main "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    script = "set -eu\n" + "\n".join(
        [*blocks, "dure endpoint delete another --wait", "dure folder delete hello"]
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**dure.environ, "PATH": f"{programs}:{dure.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Directory listing for /" in done.stdout and "nothing to change" in done.stdout
    assert "another" in done.stdout
