"""NVIDIA GPUs, through NVML."""

from __future__ import annotations

import asyncio
import threading

import pynvml

from dure.agent.accelerators import Found, Request, device
from dure.fleet.v1 import fleet_pb2

# A driver in trouble can hold a call for ever; the agent must come up nevertheless.
NVML_LIMIT_S = 15.0


class CudaAccelerator:
    """One device for each GPU, by UUID."""

    name = "cuda"
    order = 0

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
