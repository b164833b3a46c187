"""GPUs that are not there, for trying things out on a machine without any. They say so."""

from __future__ import annotations

from collections.abc import Mapping

from dure.agent.accelerators import Found, Request, device
from dure.agent.usage import DeviceUse

MEMORY_BYTES = 80 * 2**30


class SimulatedAccelerator:
    """Offers what was asked for, unless real GPUs were found."""

    name = "simulated"
    order = 100

    async def find(self, request: Request) -> Found:
        if request.simulated_gpus == 0:
            return Found()
        if request.found:
            return Found(limitations=("simulated GPUs are not offered: the node has real ones",))
        return Found(
            devices=tuple(
                device(f"SIM-{request.agent}-{index}", "simulated GPU (no hardware)", MEMORY_BYTES, self.name)
                for index in range(request.simulated_gpus)
            ),
            limitations=("its GPUs are simulated: shares are counted, nothing is accelerated",),
        )

    def measure(self) -> Mapping[str, DeviceUse]:
        # Nothing computes on them: a made-up number would scale real endpoints.
        return {}
