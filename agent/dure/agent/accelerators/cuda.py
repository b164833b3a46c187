"""NVIDIA GPUs, through NVML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dure.agent.accelerators import Found, Request
from dure.agent.nvml import gpus
from dure.agent.nvml.client import Client, NoAnswer, library_is_there
from dure.agent.usage import DeviceUse
from dure.agent.waiting import Background

# Without its persistence mode a driver takes seconds to wake its GPUs, and so it does when it is asked anew.
WAKING_LIMIT_S, LIMIT_S, USES_LIMIT_S = 15.0, 5.0, 3.0
NO_DRIVER = "there is no NVIDIA driver on this node any more"


class CudaAccelerator:
    """One device for each GPU, or for each part of one in MIG mode, by UUID."""

    name = gpus.NAME
    order = 0

    def __init__(self) -> None:
        self._client: Client | None = None
        self._asking = Background("nvml")
        self._known: Mapping[str, gpus.Known] | None = None
        self._limit_s = WAKING_LIMIT_S

    async def find(self, request: Request) -> Found:
        if self._known is None:
            own = [one for one in request.known if one.accelerator == self.name]
            self._known = {one.id: gpus.Known(one, gpus.NO_INDEX) for one in own}
        if self._client is None and library_is_there():
            self._client = Client()
        if self._client is None:
            if not self._known:
                return Found()
            answer: dict[str, Any] = {"error": NO_DRIVER, "gpus": []}
        else:
            answer = await self._ask(self._client, self._limit_s)
        seen = gpus.look(answer, self._known)
        self._known = seen.known
        return seen.found

    async def _ask(self, client: Client, limit_s: float) -> dict[str, Any]:
        try:
            answer = await self._asking.run(lambda: client.ask("devices", limit_s), limit_s + 1)
        except (NoAnswer, TimeoutError) as error:
            answer = {"error": str(error), "gpus": []}
        self._limit_s = WAKING_LIMIT_S if answer["error"] else LIMIT_S
        return answer

    def measure(self) -> Mapping[str, DeviceUse]:
        if self._client is None:
            return {}
        try:
            uses = self._client.ask("uses", USES_LIMIT_S)
        except NoAnswer:
            return {}
        return {uid: DeviceUse(_by_pid(use["util"]), _by_pid(use["memory"])) for uid, use in uses.items()}


def _by_pid(values: Mapping[str, Any] | None) -> dict[int, Any] | None:
    return None if values is None else {int(pid): value for pid, value in values.items()}
