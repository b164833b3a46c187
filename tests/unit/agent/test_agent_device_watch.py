"""The loop that looks at accelerators, with plug-ins that behave and such that do not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dure.agent import device_changes
from dure.agent.accelerators import Found, Request, device
from dure.agent.backends.base import Ended, Handle
from dure.agent.device_watch import DeviceWatch
from dure.fleet.v1 import fleet_pb2

GIB = 2**30


class Plugin:
    """Finds what it is told to, keeps what it was asked, and can hang or break."""

    name, order = "cuda", 0

    def __init__(self) -> None:
        self.found = Found((device("a", "H100", GIB, "cuda"),))
        self.requests: list[Request] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.breaks = False

    async def find(self, request: Request) -> Found:
        self.requests.append(request)
        await self.goes_on.wait()
        if self.breaks:
            raise RuntimeError("a plug-in with a mistake")
        return self.found

    def lose(self) -> None:
        sick = fleet_pb2.Device()
        sick.CopyFrom(self.found.devices[0])
        sick.healthy, sick.detail = False, "GPU is lost"
        self.found = Found((sick,), lost=frozenset({"a"}))


class Kernels:
    """One kernel on `a`, until it was condemned `lives` times."""

    def __init__(self, lives: int = 1) -> None:
        self.lives = lives
        self.ends: list[tuple[str, Ended]] = []

    def running(self) -> Sequence[tuple[fleet_pb2.KernelSpec, Handle]]:
        grants = [fleet_pb2.DeviceGrant(device="a", slot="cuda.shares", amount=500)]
        spec = fleet_pb2.KernelSpec(uid="k1", devices=grants)
        return [(spec, Handle("k1", Path("/nowhere")))] if self.lives else []

    def held(self) -> frozenset[str]:
        return frozenset("a" if self.lives else "")

    def condemn(self, uid: str, ended: Ended) -> None:
        self.lives -= 1
        self.ends.append((uid, ended))


class Watched:
    def __init__(self, file: Path, plugin: Plugin, **given: Any) -> None:
        self.devices: dict[str, fleet_pb2.Device] = {}
        self.kernels = Kernels()
        self.wakes = 0
        self.watch = DeviceWatch(
            [plugin],
            Request("node-1", 0),
            self.devices,
            self.kernels,
            self._wake,
            file=file,
            interval_s=0.005,
            **given,
        )

    def _wake(self) -> None:
        self.wakes += 1


@contextlib.asynccontextmanager
async def watching(file: Path, plugin: Plugin, **given: Any) -> AsyncIterator[Watched]:
    watched = Watched(file, plugin, **given)
    running = asyncio.create_task(watched.watch.run())
    try:
        async with asyncio.timeout(20):
            yield watched
    finally:
        running.cancel()
        await asyncio.wait([running])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_changes_are_told_once(tmp_path: Path) -> None:
    async def run() -> None:
        plugin = Plugin()
        async with watching(tmp_path / "devices.pb", plugin, limitations=["no limits"]) as watched:
            watch = watched.watch
            await watch.first()
            assert [one.id for one in watch.begin_stream()] == ["a"]
            looks = len(plugin.requests)
            await until(lambda: len(plugin.requests) > looks + 3)
            assert watched.wakes == 1 and watch.take() is None
            plugin.found = Found(
                (*plugin.found.devices, device("b", "H100", GIB, "cuda")), ("GPU 2 is sick",)
            )
            await until(lambda: watched.wakes == 2)
            news = watch.take()
            assert news is not None and [one.id for one in news.devices] == ["a", "b"]
            assert list(news.limitations) == ["no limits", "GPU 2 is sick"]
            assert watch.take() is None
            # What happened while there was no stream stands in the next Hello, and is not told after it.
            plugin.found = Found(plugin.found.devices)
            await until(lambda: watched.wakes == 3)
            assert len(watch.begin_stream()) == 2 and watch.limitations == ("no limits",)
            assert watch.take() is None

    asyncio.run(run())


def test_a_plug_in_that_hangs_keeps_the_agent_from_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        plugin = Plugin()
        plugin.goes_on.clear()
        async with watching(tmp_path / "devices.pb", plugin) as watched:
            await watched.watch.first(0.02)
            assert not watched.devices and not watched.watch.begin_stream()
            plugin.goes_on.set()
            await until(lambda: watched.watch.take() is not None)
            assert list(watched.devices) == ["a"]

    asyncio.run(run())


def test_a_plug_in_that_breaks_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        plugin = Plugin()
        plugin.breaks = True
        async with watching(tmp_path / "devices.pb", plugin) as watched:
            await until(lambda: bool(plugin.requests))
            plugin.breaks = False
            await until(lambda: bool(watched.devices))

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert "looking at the accelerators broke" in caplog.text


def test_a_kernel_of_a_lost_device_is_ended_until_it_has_ended(tmp_path: Path) -> None:
    async def run() -> None:
        plugin = Plugin()
        async with watching(tmp_path / "devices.pb", plugin) as watched:
            watched.kernels.lives = 3
            await watched.watch.first()
            plugin.lose()
            await until(lambda: not watched.kernels.lives)
            looks = len(plugin.requests)
            await until(lambda: len(plugin.requests) > looks + 3)
            assert [uid for uid, _ in watched.kernels.ends] == ["k1"] * 3
            _, ended = watched.kernels.ends[0]
            assert ended == Ended("DEVICE_LOST", -1, "device a (H100) is lost: GPU is lost")

    asyncio.run(run())


def test_who_listens_hears_every_round_and_what_he_changes_is_told(tmp_path: Path) -> None:
    async def run() -> None:
        heard: list[Found] = []

        async def listen(found: Found) -> tuple[str, ...]:
            assert "a" in watched.devices
            heard.append(found)
            watched.devices["a"].enforcement = "watchdog"
            return ("its shares are kept by a watchdog",)

        plugin = Plugin()
        async with watching(tmp_path / "devices.pb", plugin, on_round=listen) as watched:
            await until(lambda: len(heard) > 3)
            news = watched.watch.take()
            assert news is not None and news.devices[0].enforcement == "watchdog"
            assert "its shares are kept by a watchdog" in news.limitations
            assert watched.wakes == 1 and heard[0] == plugin.found

    asyncio.run(run())


def test_the_next_agent_knows_what_kernels_have(tmp_path: Path) -> None:
    async def run() -> None:
        file = tmp_path / "devices.pb"
        async with watching(file, Plugin()) as watched:
            await watched.watch.first()
        plugin = Plugin()
        plugin.goes_on.clear()
        async with watching(file, plugin, held=frozenset("a")) as watched:
            (known,) = watched.watch.begin_stream()
            assert (known.id, known.healthy, known.detail) == ("a", False, device_changes.NOT_SEEN_YET)
            await until(lambda: bool(plugin.requests))
            assert [one.id for one in plugin.requests[0].known] == ["a"]
        file.write_bytes(b"\xff\xff\xff")
        async with watching(file, plugin, held=frozenset("a")) as watched:
            assert not watched.watch.begin_stream()

    asyncio.run(run())


def test_devices_that_a_back_end_cannot_give_are_a_limitation(tmp_path: Path) -> None:
    async def run() -> None:
        why = "the engine has no NVIDIA runtime"
        withheld = {"cuda": why, "other": "of which the node has none"}
        async with watching(tmp_path / "devices.pb", Plugin(), withheld=withheld) as watched:
            await watched.watch.first()
            (known,) = watched.watch.begin_stream()
            assert (known.healthy, known.detail) == (False, why)
            assert watched.watch.limitations == (why,)

    asyncio.run(run())
