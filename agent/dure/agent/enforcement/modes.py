"""The modes of this node: which one each device has, and what a kernel is given before it starts.

What a kernel was prepared for stands in its folder, so that an agent that is started with other options knows
what to look for in it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from dure.agent import enforcement
from dure.agent.accelerators import Found
from dure.agent.backends.base import Handle, Injection, StartFailed
from dure.agent.enforcement import CannotHold, Enforcer, Held, choice
from dure.agent.enforcement.choice import AUTO, Choice
from dure.agent.enforcement.hook import Hook
from dure.agent.enforcement.mig import Mig
from dure.agent.enforcement.mps import Mps
from dure.agent.enforcement.none import Unenforced
from dure.agent.enforcement.watchdog import ALLOWANCE_MIB, Watchdog
from dure.agent.shim.files import read_json, write_json
from dure.fleet.v1 import fleet_pb2
from dure.wire.enforcement import HOOK, MIG, MODES, MPS, NONE, WATCHDOG, rank

# A kernel that comes before the first look at the devices waits for it, not longer than this.
ASSESS_LIMIT_S = 20.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What the operator wants: `option` is one of `choice.OPTIONS`."""

    option: str = AUTO
    hook_library: Path | None = None
    allowance_mib: int = ALLOWANCE_MIB


class Modes:
    """Lives on one event loop. `home` is the agent's own folder; `contains` tells whether kernels are
    contained; `devices` are those of the node."""

    def __init__(
        self, home: Path, asked: Asked, contains: bool, devices: Mapping[str, fleet_pb2.Device]
    ) -> None:
        self._asked = choice.resolve(asked.option, asked.hook_library is not None)
        self._has_library = asked.hook_library is not None
        self._contains = contains
        self._devices = devices
        self._mps = Mps(home)
        self._choices: dict[str, Choice] = {}
        self._assessed = asyncio.Event()
        self.all: Mapping[str, Enforcer] = {
            MIG: Mig(),
            MPS: self._mps,
            HOOK: Hook(home, asked.hook_library),
            WATCHDOG: Watchdog(asked.allowance_mib),
            NONE: Unenforced(),
        }

    @property
    def watches(self) -> bool:
        """Whether kernels that go beyond their parts are ended."""
        return rank(self._asked) >= rank(WATCHDOG)

    async def assess(self, found: Found) -> None:
        """Finds out the mode of each device, and writes it into the node's message of it. One that is not
        healthy keeps what it had: nothing new can be told of it."""
        for device in list(self._devices.values()):
            known = self._choices.get(device.id)
            if known is None or device.healthy:
                known = await self._choose(device, device.id in found.memory)
                if known != self._choices.get(device.id):
                    _log.info(
                        "enforcement on %s: %s%s",
                        device.id,
                        known.mode,
                        f" ({known.why})" if known.why else "",
                    )
                self._choices[device.id] = known
            device.enforcement = known.mode
        self._assessed.set()

    @property
    def limitations(self) -> tuple[str, ...]:
        """Sentences for people, about what was assessed last."""
        real = [device for device in self._devices.values() if device.accelerator == "cuda"]
        said: dict[Choice, list[str]] = {}
        for device in real:
            known = self._choices.get(device.id, Choice(NONE))
            if known.why:
                said[known] = [*said.get(known, []), device.id]
        sentences = [
            f"shares of {', '.join(ids)} are kept by `{known.mode}` and no better: {known.why}"
            for known, ids in said.items()
        ]
        if real and not self.watches:
            sentences.append("shares of GPUs are counted, not enforced: --gpu-enforcement none")
        return (*sentences, *self._mps.limitations)

    async def prepare(self, spec: fleet_pb2.KernelSpec, handle: Handle) -> Injection:
        """What the kernel is given so that it stays within its parts of devices: the best that works for all
        of them. Raises StartFailed for one that may not run with that, or OSError."""
        if not spec.devices:
            return Injection()
        try:
            async with asyncio.timeout(ASSESS_LIMIT_S):
                await self._assessed.wait()
        except TimeoutError:
            _log.warning("the GPUs of this node were not looked at within %g s", ASSESS_LIMIT_S)
        known = choice.weakest([self._choices.get(grant.device, Choice(NONE)) for grant in spec.devices])
        held, why = self.held(spec, handle), [known.why] if known.why else []
        for mode in [one for one in reversed(MODES) if rank(one) <= rank(known.mode)]:
            if rank(mode) < rank(spec.require_enforcement):
                raise StartFailed(
                    choice.shortfall(spec.require_enforcement, mode, "; ".join(why)), choice.REASON
                )
            if mode != known.mode and not await self._works(mode, held):
                continue
            try:
                injection = await self.all[mode].inject(held)
            except CannotHold as error:
                why.append(f"{mode}: {error}")
                _log.warning("kernel %s gets no enforcement by %s: %s", spec.uid, mode, error)
                continue
            write_json(str(handle.folder / "enforcement.json"), {"mode": mode, "why": "; ".join(why)})
            return injection
        raise AssertionError("without any enforcement every kernel can be prepared")

    def prepared(self, handle: Handle) -> Choice:
        """What the kernel was prepared for; what needs nothing, for one of an agent that knew of no modes."""
        kept = read_json(str(handle.folder / "enforcement.json")) or {}
        mode = str(kept.get("mode", WATCHDOG if self.watches else NONE))
        return Choice(mode if mode in self.all else NONE, str(kept.get("why", "")))

    def held(self, spec: fleet_pb2.KernelSpec, handle: Handle) -> Held:
        return Held(
            spec.uid,
            enforcement.parts(spec.devices, self._devices),
            handle.folder,
            spec.environ,
            self._contains,
            None if self._contains else os.geteuid(),
        )

    async def retire(self, prepared: Mapping[str, Collection[str]]) -> None:
        """Ends what modes that are not asked for now keep running for devices that no kernel needs any more.
        `prepared` has the devices of living kernels by mode."""
        if self._asked != MPS:
            await self._mps.retire(prepared.get(MPS, ()))

    async def detach(self) -> None:
        """Lets go of what modes keep running; it goes on."""
        await self._mps.detach()

    async def close(self) -> None:
        """Ends all that modes keep running; for when all kernels are ended."""
        await self._mps.close()

    async def _choose(self, device: fleet_pb2.Device, told: bool) -> Choice:
        tried = choice.candidates(self._asked, self._has_library, bool(device.parent))
        problems: dict[str, str] = {}
        for mode in tried:
            problems[mode] = await self.all[mode].probe(device, told)
            if not problems[mode]:
                break
        return choice.choose(tried, problems)

    async def _works(self, mode: str, held: Held) -> bool:
        """Whether a mode lower than that of a kernel's devices may take its place."""
        for part in held.parts:
            if mode not in choice.candidates(self._asked, self._has_library, bool(part.parent)):
                return False
            # Its device has a better one, which needs the driver to tell.
            if await self.all[mode].probe(self._devices[part.device], True):
                return False
        return True
