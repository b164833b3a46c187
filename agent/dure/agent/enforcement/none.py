"""Nothing keeps a kernel within its part: shares are counted, no more."""

from __future__ import annotations

from dure.agent.backends.base import Ended, Injection
from dure.agent.enforcement import Held, Seen
from dure.fleet.v1 import fleet_pb2
from dure.wire.enforcement import NONE


class Unenforced:
    """See `enforcement.Enforcer`. Always works, and is always last."""

    name = NONE
    by_use = False

    async def probe(self, device: fleet_pb2.Device, told: bool) -> str:
        return ""

    async def inject(self, kernel: Held) -> Injection:
        return Injection()

    def verify(self, kernel: Held, seen: Seen) -> str:
        return ""

    def watch(self, kernel: Held, seen: Seen) -> Ended | None:
        return None

    def forget(self, living: frozenset[str]) -> None:
        return None
