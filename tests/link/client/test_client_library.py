"""The library against a manager that behaves: calls, pages, retries, watches, waits, transfers."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path

import pytest
from link.client.fake_manager import KEY, FakeManager, fake_manager, until

from dure.client import Client
from dure.v1 import endpoint_pb2, folder_pb2
from dure.wire.errors import (
    AlreadyExists,
    Conflict,
    DureError,
    FailedPrecondition,
    InvalidInput,
    ManagerUnreachable,
    NotFound,
    TimedOut,
    Unauthenticated,
)

Body = Callable[[FakeManager, Client], Awaitable[None]]


def with_client(body: Body, retry_s: float = 3.0) -> None:
    async def run() -> None:
        async with asyncio.timeout(20), fake_manager() as fake:
            async with Client(fake.address, KEY, retry_s=retry_s) as client:
                await body(fake, client)

    asyncio.run(run())


async def make_endpoint(client: Client, name: str = "chat", replicas: int = 2) -> None:
    if name == "chat":
        await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
    await client.endpoints.create(
        name, model="m", replicas=replicas, resource_slots={"cpu": "1", "mem": "1g"}
    )


def test_endpoint_calls() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await make_endpoint(client)
        item = await client.endpoints.get("chat")
        assert (item.name, item.replica_count) == ("projects/default/endpoints/chat", 2)
        assert (await client.endpoints.get(item.name)).uid == item.uid
        changed = await client.endpoints.update("chat", replicas=3, open_to_public=True)
        assert (changed.replica_count, changed.open_to_public) == (3, True)
        with pytest.raises(Conflict):
            await client.endpoints.update("chat", replicas=1, etag=item.etag)
        assert (await client.endpoints.delete("chat")).status == endpoint_pb2.ENDPOINT_STATUS_TERMINATING
        with pytest.raises(NotFound, match="no endpoint `nope`"):
            await client.endpoints.get("nope")
        with pytest.raises(AlreadyExists):
            await make_endpoint(client)

    with_client(body)


def test_all_violations_come_at_once() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        with pytest.raises(InvalidInput) as caught:
            await client.endpoints.create(
                "Bad Name", model="m", resource_slots={"cuda.shares": "0.333", "x": "1"}
            )
        fields = [violation.field for violation in caught.value.violations]
        slots = "endpoint.resource_slots"
        assert sorted(fields) == [f"{slots}[cuda.shares]", f"{slots}[x]", "endpoint_id"]

    with_client(body)


def test_lists_run_over_all_pages() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        fake.page_size_max = 2
        for number in range(5):
            await client.folders.create(f"f{number}", folder_pb2.FOLDER_USAGE_DATA)
        assert [f.name[-2:] async for f in client.folders.list()] == ["f0", "f1", "f2", "f3", "f4"]

    with_client(body)


def test_a_lost_answer_does_not_make_a_second_endpoint() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        fake.unavailable = ["CreateEndpoint", "CreateEndpoint"]
        await make_endpoint(client)
        assert fake.calls.count("CreateEndpoint") == 3
        assert len(fake.endpoints) == 1

    with_client(body)


def test_what_is_not_safe_to_repeat_is_not_repeated() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await make_endpoint(client)
        fake.unavailable = ["CreateToken"]
        with pytest.raises(ManagerUnreachable):
            await client.tokens.create("chat", timedelta(hours=1))
        assert fake.calls.count("CreateToken") == 1

    with_client(body)


def test_a_manager_that_comes_back_in_time_is_waited_for() -> None:
    async def run() -> None:
        async with asyncio.timeout(20):
            async with fake_manager() as fake:
                port = int(fake.address.rsplit(":", 1)[1])
                client = Client(fake.address, KEY, retry_s=5.0)
                await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
            pending = asyncio.create_task(client.folders.get("m"))
            await asyncio.sleep(0)
            async with client, fake_manager(port, fake):
                assert (await pending).name.endswith("/m")

    asyncio.run(run())


def test_nobody_there() -> None:
    async def run() -> None:
        async with fake_manager() as fake:
            address = fake.address
        began = time.monotonic()
        async with Client(address, KEY, retry_s=0.5) as client:
            with pytest.raises(ManagerUnreachable, match=f"no manager answers at {address}"):
                await client.endpoints.get("chat")
        assert time.monotonic() - began < 3

    asyncio.run(run())


def test_a_manager_that_hangs_is_a_time_out() -> None:
    async def run() -> None:
        # The kernel accepts the connection, nobody ever answers.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            async with Client(address, KEY, retry_s=0.5, timeout_s=1) as client:
                with pytest.raises((ManagerUnreachable, TimedOut)):
                    await client.endpoints.get("chat")

    asyncio.run(run())


def test_a_wrong_key() -> None:
    async def run() -> None:
        async with fake_manager() as fake, Client(fake.address, "other") as client:
            with pytest.raises(Unauthenticated, match="not known"):
                await client.endpoints.get("chat")
            with pytest.raises(Unauthenticated):
                await anext(client.endpoints.watch("chat"))
        with pytest.raises(Unauthenticated, match="characters"):
            Client(fake.address, "bad\nkey")

    asyncio.run(run())


def test_a_watch_resumes_after_a_disconnect_without_a_second_snapshot() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await make_endpoint(client)
        await make_endpoint(client, "talk")
        async with aclosing(client.endpoints.watch()) as batches:
            first, second = await anext(batches), await anext(batches)
            assert (first.synced, second.synced) == (False, True)
            seen = second.revision_number
            await fake.drop_watches()
            fake.set("talk", "HEALTHY")
            third = await anext(batches)
        assert [e.name for e in third.endpoints] == ["projects/default/endpoints/talk"]
        assert [c for c in fake.calls if c.startswith("Watch")] == [
            "WatchEndpoints 0",
            f"WatchEndpoints {seen}",
        ]

    with_client(body)


def test_a_watch_starts_over_when_compacted_and_tells_what_vanished() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await make_endpoint(client)
        await make_endpoint(client, "talk")
        current = set()
        async with aclosing(client.endpoints.watch()) as batches:
            while not (batch := await anext(batches)).synced:
                current |= {e.name for e in batch.endpoints}
            current |= {e.name for e in batch.endpoints}
            assert len(current) == 2
            await fake.drop_watches()
            fake.remove("talk")
            fake.compact()
            batch = await anext(batches)
        assert batch.synced
        assert [e.name for e in batch.endpoints] == ["projects/default/endpoints/chat"]
        assert list(batch.removed) == ["projects/default/endpoints/talk"]

    with_client(body)


def test_a_watch_gives_up_in_bounded_time() -> None:
    async def run() -> None:
        async with asyncio.timeout(20):
            async with fake_manager() as fake:
                client = Client(fake.address, KEY, retry_s=0.5)
                await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
                batches = client.endpoints.watch(reconnect_s=1.0)
                assert (await anext(batches)).synced
            async with client, aclosing(batches):
                with pytest.raises(ManagerUnreachable):
                    await anext(batches)

    asyncio.run(run())


def test_wait_until_healthy_tells_every_step() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await make_endpoint(client)
        steps: list[int] = []
        waiting = asyncio.create_task(
            client.endpoints.wait("chat", timeout_s=10, notify=lambda e: steps.append(e.ready_replicas))
        )
        await until(lambda: steps)
        fake.set("chat", "DEGRADED", ready=1)
        await until(lambda: steps == [0, 1])
        await fake.drop_watches()
        fake.set("chat", "HEALTHY")
        assert (await waiting).ready_replicas == 2

    with_client(body)


def test_wait_fails_early_when_blocked_or_deleted() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await make_endpoint(client)
        fake.set("chat", "BLOCKED", ready=0, reason="exit code 3, five times")
        with pytest.raises(DureError, match="BLOCKED: exit code 3") as caught:
            await client.endpoints.wait("chat", timeout_s=10)
        assert caught.value.exit_code == 1
        waiting = asyncio.create_task(client.endpoints.wait("talk", timeout_s=10))
        with pytest.raises(NotFound):
            await waiting
        await make_endpoint(client, "talk")
        waiting = asyncio.create_task(client.endpoints.wait("talk", timeout_s=10))
        await until(lambda: fake.watches)
        fake.remove("talk")
        with pytest.raises(NotFound, match="is gone"):
            await waiting

    with_client(body)


def test_wait_times_out_with_the_newest_reason() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await make_endpoint(client)
        with pytest.raises(
            TimedOut, match=r"not ready after 0\.3 s: PENDING, 0 of 2 ready: waiting for a place"
        ):
            await client.endpoints.wait("chat", timeout_s=0.3)
        await until(lambda: not fake.watches)

    with_client(body)


def test_wait_gone() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await make_endpoint(client)
        await client.endpoints.delete("chat")
        waiting = asyncio.create_task(client.endpoints.wait_gone("chat", timeout_s=10))
        await until(lambda: fake.watches)
        fake.remove("chat")
        await waiting
        await client.endpoints.wait_gone("chat", timeout_s=10)

    with_client(body)


def test_upload_and_download_round_trip(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep" / "er").mkdir(parents=True)
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("not this")
    big = os.urandom(1_500_000)
    (source / "big.bin").write_bytes(big)
    (source / "empty").touch()
    (source / ".hidden").write_text("dot")
    (source / "deep" / "er" / "한글 name").write_text("두레")
    (source / "deep" / "run.sh").write_text("#!/bin/sh\n")
    (source / "deep" / "run.sh").chmod(0o755)
    (source / "link").symlink_to("big.bin")

    async def body(fake: FakeManager, client: Client) -> None:
        await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
        moved: dict[str, int] = {}

        def progress(path: str, count: int) -> None:
            moved[path] = moved.get(path, 0) + count

        stored = await client.folders.upload("m", source, progress=progress)
        assert [file.path for file in stored] == [
            ".hidden",
            "big.bin",
            "deep/er/한글 name",
            "deep/run.sh",
            "empty",
            "link",
        ]
        assert moved["big.bin"] == len(big)
        fake.break_download_after = 500_000
        await client.folders.download("m", target)
        assert (target / "big.bin").read_bytes() == big == (target / "link").read_bytes()
        assert (target / "empty").read_bytes() == b""
        assert (target / "deep" / "er" / "한글 name").read_text() == "두레"
        assert (target / "deep" / "run.sh").stat().st_mode & 0o777 == 0o755
        assert not [p for p in target.rglob(".*") if p.name not in (".hidden",)]
        one = tmp_path / "one"
        await client.folders.download("m", one, path="deep/run.sh")
        assert one.read_text() == "#!/bin/sh\n"
        await client.folders.download("m", tmp_path / "sub", path="deep")
        assert sorted(p.name for p in (tmp_path / "sub").rglob("*")) == ["er", "run.sh", "한글 name"]
        with pytest.raises(NotFound, match="has nothing at `nope`"):
            await client.folders.download("m", one, path="nope")

    with_client(body)


def test_an_upload_is_repeated_when_the_connection_breaks(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(os.urandom(700_000))

    async def body(fake: FakeManager, client: Client) -> None:
        await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
        fake.unavailable = ["UploadPiece"]
        moved = 0

        def progress(path: str, count: int) -> None:
            nonlocal moved
            moved += count

        await client.folders.upload("m", file, to="sub/", progress=progress)
        stored = fake.files["projects/default/folders/m"]
        assert stored["sub/model.bin"][1] == file.read_bytes()
        assert moved == 700_000

    with_client(body)


def test_a_download_never_leaves_its_target(tmp_path: Path) -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
        stored = fake.files["projects/default/folders/m"]
        stored["../evil"] = folder_pb2.File(path="../evil", size_bytes=1), b"x"
        with pytest.raises(InvalidInput, match="not a path inside"):
            await client.folders.download("m", tmp_path / "target")
        stored.clear()
        stored["out/evil"] = folder_pb2.File(path="out/evil", size_bytes=1), b"x"
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "out").symlink_to(tmp_path)
        with pytest.raises(InvalidInput, match="leads out"):
            await client.folders.download("m", tmp_path / "target")
        assert not (tmp_path / "evil").exists()

    with_client(body)


def test_an_unknown_folder_is_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")

    async def body(fake: FakeManager, client: Client) -> None:
        with pytest.raises(NotFound, match="no folder `nope`"):
            await client.folders.upload("nope", tmp_path)
        await make_endpoint(client)
        with pytest.raises(FailedPrecondition):
            await client.folders.delete("m")

    with_client(body)
