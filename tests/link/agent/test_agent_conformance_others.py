"""`dure agent conformance` against programs that keep to a part of the protocol, and plug-ins of ours."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest
import tomli
from agent_fakes import cluster, spec
from conformance_command import conformance, only, outcomes
from test_agent_node import POOR, root_only, usable

from dure.agent.conformance.checks import CHECKS

ROOT = Path(__file__).parents[3]
TINY = (sys.executable, str(Path(__file__).with_name("tiny_agent.py")))
PLACES = ("--manager", "{manager}", "--name", "{name}", "--state", "{data_dir}")
# What the tiny agent keeps to.
KEPT = (
    *("join", "identity-is-kept", "hello", "devices", "report-before-desired", "heartbeats", "reconnect"),
    *(
        "replay",
        "unknown-removal",
        "removed-stays-gone",
        "argv-as-it-is",
        "shell-line",
        "exit-code",
        "signal",
    ),
    *("reachable", "health-by-port", "exited-is-kept", "messages-in-bounds"),
)


def test_any_program_that_keeps_to_the_protocol(tmp_path: Path) -> None:
    done = conformance(tmp_path, *only(KEPT), "--", *TINY, *PLACES)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{len(KEPT)} passed, 0 failed, 0 not applicable"
    assert re.fullmatch(r"passed +join +1\.1 +\d+\.\d s", lines[0])


@pytest.mark.parametrize(
    ("lie", "broken"),
    [
        ("never-complete", {"report-before-desired"}),
        ("forgets", {"reconnect"}),
        ("exit-codes", {"exit-code"}),
        ("silent", {"heartbeats"}),
    ],
)
def test_who_breaks_a_rule_fails_its_check(tmp_path: Path, lie: str, broken: set[str]) -> None:
    tried = ("report-before-desired", "heartbeats", "reconnect", "replay", "exit-code")
    done = conformance(
        tmp_path, *only(tried), "-o", "json", "--timeout", "8", "--", *TINY, *PLACES, "--lie", lie
    )
    found = outcomes(done)
    assert {name for name, check in found.items() if check["outcome"] == "failed"} == broken, found
    assert done.returncode == 1
    rules = {check.name: check.rule for check in CHECKS}
    for name in broken:
        assert found[name]["expected"] and found[name]["seen"] and found[name]["rule"] == rules[name]


def test_what_an_agent_never_learned_is_told(tmp_path: Path) -> None:
    """The tiny agent kills at once, and only the main process; it answers no request for a log."""
    tried = ("nothing-is-left", "stop-by-force", "log-tail", "command-not-found")
    done = conformance(tmp_path, *only(tried), "--timeout", "5", "-o", "json", "--", *TINY, *PLACES)
    found = outcomes(done)
    assert {check["outcome"] for check in found.values()} == {"failed"}
    assert "processes [" in found["nothing-is-left"]["seen"]
    assert found["stop-by-force"]["expected"] == "GONE soon after its grace of 1.5 s"
    assert "no call of SendLogs" in found["log-tail"]["seen"] and found["log-tail"]["rule"] == "11.2"


@root_only
@pytest.mark.skipif(not usable(POOR), reason="needs unshare and setpriv")
def test_what_a_node_says_that_it_lacks_does_not_fail_it(tmp_path: Path) -> None:
    lacking = ("extra-mounts", "shared-memory", "names-resolve", "out-of-memory", "model-folder-is-read-only")
    working = ("templates", "private-home", "actions-in-order", "nothing-is-left")
    agent = (*POOR, sys.executable, "-m", "dure.agent.main", "--data-dir", "{data_dir}", "--name", "{name}")
    arguments = (*only([*lacking, *working]), "-o", "json", "--", *agent, "--manager", "{manager}")
    done = conformance(tmp_path, *arguments)
    found = outcomes(done)
    assert done.returncode == 0, found
    assert all(found[name]["outcome"] == "not_applicable" and found[name]["reason"] for name in lacking), (
        found
    )
    assert all(found[name]["outcome"] == "passed" for name in working), found


def test_a_program_that_cannot_run(tmp_path: Path) -> None:
    done = conformance(tmp_path, "--", str(tmp_path / "missing"))
    assert done.returncode == 2 and f"there is no program `{tmp_path}/missing`" in done.stderr
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/sh\n")
    broken.chmod(0o755)
    done = conformance(tmp_path, "--", str(broken))
    assert done.returncode == 2 and "cannot start" in done.stderr and "No such file" in done.stderr
    done = conformance(tmp_path, "--only", "join", "--", "/bin/sh", "-c", "echo out of order; exit 3")
    assert done.returncode == 1
    assert "expected a stream with Hello after the program's start" in done.stdout
    assert "its program exited with code 3: out of order" in done.stdout
    assert "rule 1.1 of docs/agent-protocol.md" in done.stdout
    done = conformance(tmp_path, "--only", "join", "--timeout", "1", "--", "/bin/sleep", "60")
    assert done.returncode == 1 and "no Hello within 1 s" in done.stdout


def test_list_and_usage(tmp_path: Path) -> None:
    done = conformance(tmp_path, "--list")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(CHECKS)
    listed = json.loads(conformance(tmp_path, "--list", "-o", "json", "--only", "join").stdout)
    assert [(one["name"], one["rule"]) for one in listed] == [("join", "1.1")]
    for arguments, words in (
        (("--only", "jion"), "did you mean `join`?"),
        (("--only", "xyzzy"), "--list shows all"),
        (("--timeout", "0"), "--timeout"),
        (("--backend", "process", "--", "true"), "--backend is for this package's own agent"),
        (("-o", "yaml"), "yaml"),
        (("--backend", "nowhere"), "there is no back end `nowhere`"),
        (("./my-agent", "--list"), "unexpected `./my-agent`: a PROGRAM and its arguments come after `--`"),
        (("--list", "--"), "name a PROGRAM after `--`"),
    ):
        done = conformance(tmp_path, *arguments)
        assert done.returncode == 2 and words in done.stderr, (arguments, done.stderr)
    done = conformance(tmp_path, "--backend", "process", "--image", "i", "--only", "join")
    assert done.returncode == 0 and "--image was not used" in done.stderr


def plug_ins(folder: Path) -> None:
    """Installs the example of the documentation, as pip would."""
    text = (ROOT / "docs" / "agent-protocol.md").read_text()
    (declared,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (folder / "site_plugins.py").write_text(code)
    info = folder / "site_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: site-plugins\nVersion: 1.0\n")
    groups = tomli.loads(declared)["project"]["entry-points"]
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{name} = {where}" for name, where in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


def test_plug_ins_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, cards = tmp_path / "site", tmp_path / "cards"
    site.mkdir()
    cards.mkdir()
    (cards / "card0").touch()
    (cards / "card1").touch()
    plug_ins(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("CARDS_DIR", str(cards))
    tried = ("hello", "devices", "variables", "more-than-there-is", "kernels-outlive-the-agent")
    done = conformance(tmp_path, "--backend", "threads", "-o", "json", *only(tried))
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["agent"]["backend"] == "threads"
    assert {check["outcome"] for check in outcomes(done).values()} == {"passed"}

    async def run() -> None:
        async with cluster(tmp_path, "--backend", "threads") as (manager, _):
            assert manager.hello is not None
            assert [device.id for device in manager.hello.devices] == ["CARD-card0", "CARD-card1"]
            manager.want(spec("k1", slots={"cpu": 3000}))
            status = await manager.healthy("k1")
            assert b"\0OMP_NUM_THREADS=3\0" in Path(f"/proc/{status.pid}/environ").read_bytes()

    asyncio.run(run())
