"""The contract between the agent and what runs its kernels.

A back end keeps what it needs to find a kernel again in the kernel's own folder, so that an agent that
was killed can adopt: a handle is that folder and the uid. Entry points of the group
`dure.agent.backends` name classes that take the agent's own folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dure.agent.usage import Usage

HOME = "/home/work"


@dataclass(frozen=True)
class Handle:
    """A kernel on this node: its uid, and the folder that holds everything of it."""

    uid: str
    folder: Path


@dataclass(frozen=True)
class ExtraMount:
    """A folder beside the model folder: `subpath` (empty: all) of the real folder `source` at `target`."""

    name: str
    source: Path
    subpath: str
    target: str
    writable: bool


@dataclass(frozen=True)
class ClusterFiles:
    """What a kernel of several has of its own: a table of host names, and content and mode of the files in
    its `.ssh`, given the session's home."""

    hosts: str
    ssh: Callable[[str], Mapping[str, tuple[str, int]]]


@dataclass(frozen=True)
class Plan:
    """What to run. `model` is a real folder; `model_target` is where the kernel should see it. Neither
    `argv` nor `shell`: the image's own command."""

    handle: Handle
    model: Path | None
    model_target: str
    model_path: str
    argv: tuple[str, ...]
    shell: str
    line: str
    actions: tuple[dict[str, Any], ...]
    environ: Mapping[str, str]
    port: int
    cpu_milli: int
    memory_bytes: int
    stop_grace_s: float
    extra_mounts: tuple[ExtraMount, ...] = ()
    # 0 for the back end's default.
    shared_memory_bytes: int = 0
    # None for a session of one.
    cluster: ClusterFiles | None = None


@dataclass(frozen=True)
class Ended:
    """How a kernel ended: the words of `KernelExit`. `by_wish` is set when it had been told to stop."""

    reason: str
    code: int
    message: str
    by_wish: bool = False


@dataclass(frozen=True)
class Observation:
    """What is seen of a kernel. `started_at_s` is CLOCK_BOOTTIME at the start of its command, 0 before."""

    pid: int = 0
    started_at_s: float = 0.0
    message: str = ""
    ended: Ended | None = None


@dataclass(frozen=True)
class Abilities:
    """What a back end can do on this node; `limitations` are sentences for people."""

    maps_mounts: bool
    runs_images: bool
    limitations: tuple[str, ...] = field(default=())


class StartFailed(Exception):
    """A kernel that cannot be started; `reason` is a word of `KernelExit`."""

    def __init__(self, message: str, reason: str = "START_FAILED") -> None:
        super().__init__(message)
        self.reason = reason


class Backend(Protocol):
    """Runs kernels. Every verb may be called again after a crash at any point of it."""

    name: str

    def model_place(self, model: Path | None, target: str) -> str:
        """Where a kernel will see the model folder `model` that should appear at `target`."""

    async def probe(self) -> Abilities:
        """Finds out what works here; called once, before anything else."""

    async def start(self, plan: Plan) -> None:
        """Begins a start. Raises StartFailed, or OSError."""

    async def adopt(self, handle: Handle) -> bool:
        """Takes up a kernel that an earlier agent started; False if that one had not come that far."""

    async def wait(self, handle: Handle, seen: Observation | None) -> Observation:
        """The next observation that differs from `seen`."""

    async def stop(self, handle: Handle, grace_s: float) -> None:
        """Ends the kernel, by force after `grace_s`. Nothing of it runs when this returns."""

    async def clean(self, handle: Handle) -> None:
        """Leaves nothing of a stopped kernel but its folder. Raises OSError if something resists."""

    async def processes(self, handle: Handle) -> frozenset[int]:
        """Host pids of the kernel's processes."""

    def measure(self, handle: Handle) -> Usage | None:
        """What the kernel has used; None if that cannot be told. Blocks for well under a millisecond, and is
        called from a thread of its own."""

    def log_tail(self, handle: Handle, bytes_max: int) -> str:
        """The end of its log."""

    def write_exit(self, handle: Handle, ended: Ended) -> None:
        """Keeps an end that the back end did not see: a start that failed."""
