"""NVIDIA GPUs, through NVML."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pynvml

from dure.agent.accelerators import Found, Request, device
from dure.agent.usage import DeviceUse
from dure.fleet.v1 import fleet_pb2

# A driver in trouble can hold a call for ever; the agent must come up nevertheless.
NVML_LIMIT_S = 15.0


class CudaAccelerator:
    """One device for each GPU, by UUID."""

    name = "cuda"
    order = 0

    def __init__(self) -> None:
        self._meter: Meter | None = None

    async def find(self, request: Request) -> Found:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Found] = loop.create_future()

        def deliver(found: Found) -> None:
            if not answer.done():
                answer.set_result(found)

        # A daemon thread: one that never comes back must not keep the agent from ending.
        threading.Thread(
            target=lambda: loop.call_soon_threadsafe(deliver, _find()), name="nvml", daemon=True
        ).start()
        done, _ = await asyncio.wait([answer], timeout=NVML_LIMIT_S)
        if not done:
            return Found(limitations=(f"NVML did not answer within {NVML_LIMIT_S:g} s: no GPUs are offered",))
        return answer.result()

    def measure(self) -> Mapping[str, DeviceUse]:
        try:
            if self._meter is None:
                pynvml.nvmlInit()
                self._meter = Meter()
            return self._meter.look()
        except pynvml.NVMLError:
            # The driver went away, or was never there: from the beginning next time.
            if self._meter is not None:
                self._meter = None
                _shut_down()
            return {}


class Meter:
    """Looks at what processes use of the GPUs of this node. NVML must stay initialised while it lives."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        # Newest sample seen of each GPU, in the driver's microseconds: each look asks for those after it.
        self._seen_us: dict[str, int] = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self._handles[_text(pynvml.nvmlDeviceGetUUID(handle))] = handle

    def look(self) -> dict[str, DeviceUse]:
        return {
            uuid: DeviceUse(self._util(uuid, handle), _memory_bytes(handle))
            for uuid, handle in self._handles.items()
        }

    def _util(self, uuid: str, handle: Any) -> dict[int, float] | None:
        """Percent of the time that each process kept the GPU busy, averaged over the samples since the last
        look; None where the driver does not tell (a GPU in MIG mode, an old one)."""
        try:
            samples = pynvml.nvmlDeviceGetProcessUtilization(handle, self._seen_us.get(uuid, 0))
        except pynvml.NVMLError as error:
            # Not found, or no samples at all (an error of "success"): nothing has run since the last look.
            nothing = error.value in (pynvml.NVML_SUCCESS, pynvml.NVML_ERROR_NOT_FOUND)
            return {} if nothing else None
        by_pid: dict[int, list[float]] = defaultdict(list)
        for sample in samples:
            self._seen_us[uuid] = max(self._seen_us.get(uuid, 0), int(sample.timeStamp))
            # Drivers have been seen to leave garbage in samples of processes that are gone.
            if sample.pid and 0 <= sample.smUtil <= 100:
                by_pid[int(sample.pid)].append(float(sample.smUtil))
        return {pid: sum(found) / len(found) for pid, found in by_pid.items()}


def _memory_bytes(handle: Any) -> dict[int, int] | None:
    used: dict[int, int] = {}
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    # GPUs of data centres may know no graphics.
    with contextlib.suppress(pynvml.NVMLError):
        running += pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
    for process in running:
        if process.usedGpuMemory is not None:
            # A process that does both stands in both lists with all of its memory.
            used[int(process.pid)] = max(used.get(int(process.pid), 0), int(process.usedGpuMemory))
    return used


def _find() -> Found:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return Found()
    except pynvml.NVMLError as error:
        return Found(limitations=(f"NVML cannot be used: {error}",))
    try:
        count = pynvml.nvmlDeviceGetCount()
        found = [_device(index) for index in range(count)]
    except pynvml.NVMLError as error:
        return Found(limitations=(f"NVML cannot list the GPUs: {error}",))
    finally:
        _shut_down()
    devices = tuple(one for one in found if not isinstance(one, str))
    return Found(devices, tuple(one for one in found if isinstance(one, str)))


def _device(index: int) -> fleet_pb2.Device | str:
    """The GPU, marked when something is wrong with it; a sentence if not even its UUID can be read."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError as error:
        return f"GPU {index} cannot be used: {error}"
    found = device(uuid, "unknown", 0, "cuda")
    try:
        found.model = _text(pynvml.nvmlDeviceGetName(handle))
        found.memory_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError as error:
        found.healthy = False
        found.detail = f"the driver does not answer for it: {error}"
    return found


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _shut_down() -> None:
    try:
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return
