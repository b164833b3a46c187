"""Containers that do not start, or end: each for a reason of its own, and nothing is left."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from pathlib import Path

from containers import engines
from containers.nodes import kernel, names, node, report
from own_ports import free_port

from dure.fleet.v1 import fleet_pb2
from dure.fleet.v1.fleet_pb2 import PreStartAction

OTHER = engines.tag("s390x")
NEVER, ALWAYS = fleet_pb2.IMAGE_PULL_POLICY_NEVER, fleet_pb2.IMAGE_PULL_POLICY_ALWAYS
HOG = "x = bytearray(64 * 2**20)\nwhile True:\n    x += bytes(2**24)"


def other_architecture() -> bytes:
    """An image for machines that nobody has here, as an archive that an engine loads."""
    data = io.BytesIO()
    config = json.dumps(
        {"architecture": "s390x", "os": "linux", "config": {"Cmd": ["true"]}, "rootfs": {"type": "layers"}}
    ).encode()
    manifest = json.dumps([{"Config": "c.json", "RepoTags": [OTHER], "Layers": []}]).encode()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in (("c.json", config), ("manifest.json", manifest)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def test_images_that_cannot_run(tmp_path: Path) -> None:
    closed = f"127.0.0.1:{free_port()}/nothing/here:1"
    cases = {
        "never": (kernel("never", image="dure-test:none", image_pull_policy=NEVER), "is not on this node"),
        "none": (kernel("none", image=""), "--image"),
        "unreachable": (kernel("unreachable", image=closed), "connection refused"),
        "bad": (kernel("bad", image="No Such*Thing"), "names no image"),
        "worse": (kernel("worse", image="-No/Thing", image_pull_policy=ALWAYS), "image"),
        "other": (kernel("other", image=OTHER), "is made for s390x, this node is"),
    }

    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            manager.want(*(spec for spec, _ in cases.values()))
            for uid, (_, words) in cases.items():
                ended = (await manager.exited(uid)).exit
                assert ended.reason == "IMAGE_FAILED", ended
                assert words in ended.message, ended
                assert not manager.statuses[uid].HasField("pull")
            assert await names(agent) == []

    with engines.client() as engine:
        engine.load_image(other_architecture())
        try:
            asyncio.run(run())
        finally:
            engine.remove_image(OTHER, force=True)


def test_commands_that_cannot_start_and_ends(tmp_path: Path) -> None:
    """Of commands that are not there, exits, signals, memory; and what a port needs."""
    small = {"slots": {"cpu": 1000, "mem": 96 * 2**20 * 1000}}
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOG!r}])"
    # uid: the command, further fields, reason, code (None for any), words of the message.
    cases: dict[str, tuple[list[str] | str, dict[str, object], str, int | None, str]] = {
        "missing": (["nowhere-to-be-found"], {}, "START_FAILED", None, "nowhere-to-be-found"),
        "text": (["/models/server.py"], {}, "START_FAILED", None, "not executable"),
        "folder": (["/usr"], {}, "START_FAILED", None, "/usr"),
        "no-shell": ("true", {"command": "shell"}, "START_FAILED", None, "/bin/nosuchshell"),
        "mount": (["true"], {"model": "twice"}, "START_FAILED", None, "ount"),
        "zero": ("exit 0", {}, "EXITED", 0, "keep it in the foreground"),
        "three": ("echo going; exit 3", {}, "EXITED", 3, "code 3"),
        "kill": ("kill -9 $$", {}, "SIGNALED", 137, "SIGKILL"),
        "term": ("kill -TERM $$", {}, "SIGNALED", 143, "SIGTERM"),
        "hog": (["python", "-c", HOG], small, "OOM", 137, "more memory than it was granted"),
        "child": (["python", "-c", child], small, "OOM", 0, "a process of it used more memory"),
    }

    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            for uid, (command, fields, *_) in cases.items():
                if "command" in fields:
                    spec = kernel(uid, command, health_check=None)
                    spec.command.shell.shell = "/bin/nosuchshell"
                elif "model" in fields:
                    spec = kernel(uid, command, health_check=None)
                    spec.model.target = "/home/work"
                else:
                    spec = kernel(uid, command, health_check=None, **fields)
                manager.want(spec)
            for uid, (_, _, reason, code, words) in cases.items():
                ended = (await manager.exited(uid)).exit
                assert ended.reason == reason, (uid, ended)
                assert code is None or ended.code == code, (uid, ended)
                assert words in ended.message, (uid, ended)
            assert manager.statuses["three"].exit.log_tail == "going\n"
            started = {uid for uid, (_, _, reason, *_) in cases.items() if reason != "START_FAILED"}
            # Ends are kept until the manager has them removed; what never ran is gone at once.
            left = set(await names(agent))
            assert started <= left and not left & {"mount"}, left
            for uid in cases:
                manager.unwant(uid)
            for uid in cases:
                await manager.gone(uid)
            assert await names(agent) == []

    asyncio.run(run())


def actions(*given: PreStartAction) -> dict[str, object]:
    return {"pre_start_actions": given, "health_check": None}


def command(*words: str, check: bool = True, ref: str = "", echo: bool = False) -> PreStartAction:
    return PreStartAction(ref=ref, run_command=fleet_pb2.RunCommand(command=words, check=check, echo=echo))


def file(filename: str, body: str, **fields: object) -> PreStartAction:
    return PreStartAction(write_file=fleet_pb2.WriteFile(filename=filename, body=body, mode=0o640, **fields))


TELL = """
import json, os, stat, sys
report = {"argv": sys.argv[1:], "file": open("/home/work/deep/file").read(), "uid": os.getuid(),
    "mode": stat.S_IMODE(os.stat("/home/work/deep/file").st_mode), "own": open(sys.argv[2]).read()}
json.dump(report, open("/home/work/report.json", "w"))
import time; time.sleep(3600)
"""


def test_actions_before_the_command(tmp_path: Path) -> None:
    async def run(user: str) -> None:
        async with node(tmp_path) as (manager, agent):
            (manager.storage / "folder-1" / "tell.py").write_text(TELL)
            every = actions(
                PreStartAction(mkdir=fleet_pb2.Mkdir(path="/home/work/deep/er", parents=True)),
                file("/home/work/deep/file", "one {port}\n"),
                file("/home/work/deep/file", "two $HOME '\"\n", append=True),
                PreStartAction(ref="temp", write_tempfile=fleet_pb2.WriteTempfile(body="tmp", suffix=".x")),
                command("sh", "-c", "echo $GREETING from $(pwd); echo bad >&2", ref="run", echo=True),
                command("false", check=False),
                PreStartAction(log=fleet_pb2.Log(message="it said {run.out}")),
            )
            words = ["python", "tell.py", "{run.out}", "{temp}", "{run.err}", "{nothing}"]
            manager.want(
                kernel("root", words, **every),
                kernel("user", words, image=user, **every),
                kernel("strict", words, security_profile=fleet_pb2.SECURITY_PROFILE_STRICT, **every),
            )
            for uid, number in (("root", 0), ("user", 1234), ("strict", 1000)):
                found = await report(manager, agent, uid)
                assert found["uid"] == number
                assert found["file"] == "one 8000\ntwo $HOME '\"\n" and found["mode"] == 0o640
                out, temp, err, nothing = found["argv"]
                assert (out, err, nothing) == ("hello from /models", "bad", "{nothing}")
                assert temp.endswith(".x") and found["own"] == "tmp"
                lines = await manager.log_of(uid)
                assert sorted(lines) == ["bad", "hello from /models", "it said hello from /models"]

    with engines.variant("actions", "USER 1234:1234") as user:
        asyncio.run(run(user))


def test_actions_that_fail(tmp_path: Path) -> None:
    fine = PreStartAction(log=fleet_pb2.Log(message="fine"))
    cases = {
        "code": (command("sh", "-c", "echo why >&2; exit 4"), ("action 1 (run_command)", "code 4", "why")),
        "absent": (command("not-there"), ("action 1 (run_command)", "not-there")),
        "model": (file("x", "y"), ("action 1 (write_file)", "read-only", "/home/work")),
        "mkdir": (
            PreStartAction(mkdir=fleet_pb2.Mkdir(path="/home/work/a/b")),
            ("action 1 (mkdir)", "No such file"),
        ),
    }

    async def run(bare: str) -> None:
        async with node(tmp_path) as (manager, agent):
            for uid, (action, _) in cases.items():
                manager.want(kernel(uid, **actions(fine, action)))
            manager.want(kernel("shell-less", image=bare, **actions(fine)))
            for uid, (_, words) in cases.items():
                ended = (await manager.exited(uid)).exit
                assert ended.reason == "ACTION_FAILED", (uid, ended)
                for word in words:
                    assert word in ended.message, (uid, ended)
            ended = (await manager.exited("shell-less")).exit
            assert "/bin/sh" in ended.message and ended.reason == "START_FAILED", ended
            await manager.until(lambda: all(status.HasField("exit") for status in manager.statuses.values()))
            assert set(await names(agent)) <= {"shell-less"}

    with engines.changed("bare", "rm /bin/sh", "CMD []") as bare:
        asyncio.run(run(bare))


def test_removal_while_a_start_is_under_way(tmp_path: Path) -> None:
    """At moments over all of a start, actions included."""

    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            slow = actions(command("sleep", "0.3"), command("sleep", "60"))
            for moment in range(12):
                uid = f"k{moment}"
                manager.want(kernel(uid, **slow))
                await asyncio.sleep(moment * 0.08)
                manager.unwant(uid)
            for moment in range(12):
                await manager.gone(f"k{moment}")
            assert await names(agent) == []
            assert not list((agent.home / "kernels").iterdir())

    asyncio.run(run())
