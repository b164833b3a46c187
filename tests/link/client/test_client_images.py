"""`dure registry`, and images that are being fetched, as the command line shows them."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from link.chat.terminal import terminal
from link.client.dure_program import CREATE, Dure, finish, with_cli
from link.client.fake_manager import FakeManager, until
from link.client.fake_trials import pieces

from dure.v1.endpoint_pb2 import ImageLayer, ImagePull, Kernel, ValidateEndpointResponse

PASSWORD = "correct-horse-battery"
CHAT = "projects/default/endpoints/chat"
IMAGE = "registry.example.com:5000/team/server:1"
MIB = 2**20


def test_registries(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        ran = await dure.fed(
            b"s\xc3\xa9cret\r\n", "registry", "set", "GHCR.io", "-u", "me", "--password-stdin"
        )
        assert ran.code == 0, ran
        kept = fake.registries["projects/default/registries/ghcr.io"]
        assert (kept.username, kept.password) == ("me", "s\u00e9cret")
        assert "credential for ghcr.io kept" in ran.out and "s\u00e9cret" not in ran.out + ran.err
        # Whole key files are passwords, too.
        key = b'{\n "key": 1\n}\n'
        document = await dure.fed(
            key, "registry", "set", "index.docker.io", "-u", "json", "--password-stdin", "-o", "json"
        )
        assert document.json["name"] == "projects/default/registries/docker.io"
        assert "password" not in document.json
        assert fake.registries["projects/default/registries/docker.io"].password == key.decode()[:-1]
        table = (await dure.ok("registry", "list")).out
        assert table.splitlines()[0].split() == ["HOST", "AGE", "SET", "USERNAME"]
        assert [line.split()[0] for line in table.splitlines()[1:]] == ["docker.io", "ghcr.io"]
        listed = (await dure.ok("registry", "list", "-o", "json")).json["registries"]
        assert "secret" not in json.dumps(listed) and len(listed) == 2
        assert (await dure.ok("registry", "list", "-q")).out.split() == ["docker.io", "ghcr.io"]
        assert "ghcr.io deleted" in (await dure.ok("registry", "delete", "ghcr.io")).out
        gone = await dure("registry", "delete", "ghcr.io")
        assert gone.code == 3 and "`dure registry list`" in gone.err
        await dure.ok("registry", "delete", "docker.io")
        assert "dure registry set HOST" in (await dure.ok("registry", "list")).err

        stdin = ("registry", "set", "ghcr.io", "-u", "me", "--password-stdin")
        calls = list(fake.calls)
        for content, said in (
            (b"", "the password is empty"),
            (b"\n", "the password is empty"),
            (b"\xff\xfe", "no text in UTF-8"),
            (b"x" * 70_000, "more than a password"),
        ):
            ran = await dure.fed(content, *stdin)
            assert (ran.code, said in ran.err) == (2, True), ran
        no_terminal = await dure("registry", "set", "ghcr.io", "-u", "me")
        assert no_terminal.code == 2 and "--password-stdin" in no_terminal.err
        option = await dure("registry", "set", "ghcr.io", "-u", "me", "--password", PASSWORD)
        assert option.code == 2 and PASSWORD not in option.err
        address = await dure.fed(PASSWORD.encode(), "registry", "set", "https://ghcr.io", *stdin[3:])
        assert address.code == 2 and "that images name: ghcr.io" in address.err, address
        assert fake.calls == calls

    with_cli(tmp_path, body)


def test_a_password_is_asked_for_without_an_echo(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        command = (sys.executable, "-m", "dure.client.cli.main", "registry", "set", "ghcr.io", "-u", "me")
        async with terminal(*command, env=dure.environ, columns=120) as screen:
            await screen.sees("Password for ghcr.io")
            screen.type(f"{PASSWORD}\r")
            await screen.sees("credential for ghcr.io kept")
            assert await screen.process.wait() == 0
            assert PASSWORD not in screen.text
        assert fake.registries["projects/default/registries/ghcr.io"].password == PASSWORD
        async with terminal(*command, env=dure.environ, columns=120) as screen:
            await screen.sees("Password for ghcr.io")
            screen.type("\r")
            await screen.sees("the password is empty")
            assert await screen.process.wait() == 2

    with_cli(tmp_path, body)


def pull(done: int) -> ImagePull:
    layers = [
        ImageLayer(id="aaaa", status="Pull complete", current_bytes=20 * MIB, total_bytes=20 * MIB),
        ImageLayer(id="bbbb", status="Downloading", current_bytes=done * MIB, total_bytes=80 * MIB),
    ]
    return ImagePull(image=IMAGE, layers=layers)


def moves(fake: FakeManager, done: int | None) -> None:
    """An endpoint's first replica has fetched so much; None: all."""
    replica = fake.endpoints[CHAT].replicas[0]
    del replica.kernels[:]
    kernel = replica.kernels.add(uid="k", host="main1", node="agents/agent-1")
    if done is not None:
        kernel.pull.CopyFrom(pull(done))
    fake.touch(CHAT)


async def starting(fake: FakeManager, dure: Dure) -> None:
    await dure.ok("folder", "create", "m", "--usage", "model")
    await dure.ok(*CREATE)
    fake.set("chat", "DEGRADED", ready=0, reason="starting")
    moves(fake, 0)


def test_a_wait_tells_how_far_an_image_is(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await starting(fake, dure)
        process = await dure.start("endpoint", "wait", "chat")
        assert process.stderr is not None
        said = b""
        while b"20 of 100 MiB" not in said:
            said += await asyncio.wait_for(process.stderr.readline(), 10)
        assert f"agent-1: pulling {IMAGE}: 1 of 2 layers, 20 of 100 MiB" in said.decode()
        for done in range(1, 60):
            moves(fake, done)
            await asyncio.sleep(0.01)
        moves(fake, None)
        fake.set("chat", "HEALTHY")
        ran = await finish(process)
        assert ran.code == 0
        # All of that within the five seconds in which nothing more is said of it.
        assert "pulling" not in ran.err, ran

        fake.set("chat", "DEGRADED", ready=0, reason="starting")
        moves(fake, 40)
        shown = (await dure.ok("endpoint", "get", "chat")).out
        assert f"main1 on agent-1: pulling {IMAGE}: 1 of 2 layers, 60 of 100 MiB" in shown
        # A row is not another one because of that.
        process = await dure.start("endpoint", "get", "chat", "-w", "-o", "table")
        assert process.stdout is not None
        first = (await process.stdout.readline(), await process.stdout.readline())
        moves(fake, 50)
        fake.set("chat", "HEALTHY")
        assert b"DEGRADED" in first[1] and b"HEALTHY" in await asyncio.wait_for(process.stdout.readline(), 10)
        process.terminate()
        await process.wait()

    with_cli(tmp_path, body)


def test_a_terminal_gets_a_bar_for_each_layer(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await starting(fake, dure)
        command = (sys.executable, "-m", "dure.client.cli.main", "endpoint", "wait", "chat")
        environ = {**dure.environ, "TERM": "xterm"}
        async with terminal(*command, env=environ, rows=40, columns=160) as screen:
            await screen.sees("1 of 2 layers, 20 of 100 MiB")
            await screen.sees("bbbb")
            moves(fake, 40)
            await screen.sees("1 of 2 layers, 60 of 100 MiB")
            await screen.sees("[############............] 40 of 80 MiB")
            fake.set("chat", "HEALTHY")
            await screen.sees("endpoint chat is HEALTHY")
            assert await screen.process.wait() == 0

    with_cli(tmp_path, body)


def kernel_piece(done: int | None) -> ValidateEndpointResponse:
    kernel = Kernel(uid="k", host="main1", node="agents/agent-1")
    if done is not None:
        kernel.pull.CopyFrom(pull(done))
    return ValidateEndpointResponse(kernel=kernel)


def test_a_validation_tells_it_too(tmp_path: Path) -> None:
    async def body(fake: FakeManager, dure: Dure) -> None:
        await dure.ok("folder", "create", "m", "--usage", "model")
        placed, log, outcome = pieces("FINISHED", "HEALTHY")
        fetched = [kernel_piece(done) for done in (0, 40, 80, None)]
        fake.validation = [placed, *fetched, log, outcome]
        ran = await dure.ok("endpoint", "validate", "--model", "m")
        assert ran.err.strip() == f"agent-1: pulling {IMAGE}: 1 of 2 layers, 20 of 100 MiB"
        assert "REPLICA_PLACED" in ran.out and ran.out.splitlines()[-1] == "Finished: HEALTHY"
        assert (await dure.ok("endpoint", "validate", "--model", "m", "-q")).err == ""
        documents = (await dure.ok("endpoint", "validate", "--model", "m", "-o", "json")).out.splitlines()
        assert json.loads(documents[2])["kernel"]["pull"]["layers"][1]["status"] == "Downloading"
        # On a terminal it stands below what was printed, and is gone when something is.
        fake.validation = [placed, *fetched[:2]]
        command = (sys.executable, "-m", "dure.client.cli.main", "endpoint", "validate", "--model", "m")
        async with terminal(*command, env={**dure.environ, "TERM": "xterm"}, columns=160) as screen:
            await screen.sees("REPLICA_PLACED")
            await screen.sees("60 of 100 MiB")
            await screen.sees("[############............] 40 of 80 MiB")
            screen.type("\x03")
            assert await screen.process.wait() == 130
        await until(lambda: fake.sessions == 0)

    with_cli(tmp_path, body)
