"""The contract between the agent and what runs its kernels.

A back end keeps what it needs to find a kernel again in the kernel's own folder, so that an agent that
was killed can adopt: a handle is that folder and the uid. Entry points of the group
`dure.agent.backends` name classes that take the agent's own folder.

A kernel may be contained: it runs in an image, with a file system and, unless its session spans nodes
without an overlay, a network of its own. Then it binds the port that is declared, and the back end tells
where that is reached.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dure.agent import clusters
from dure.agent.usage import Usage
from dure.fleet.v1 import fleet_pb2

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
    # Of all kernels of the session, numeric; empty where the session has a network of its own.
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bind:
    """A file or folder of the node, and where it appears in a container."""

    source: str
    target: str
    read_only: bool


@dataclass(frozen=True)
class Injection:
    """What keeps a kernel within its parts of devices needs this of it. Variables win over its own; `binds`
    and `host_ipc` (the node's shared memory in place of its own) are for a contained one."""

    environ: Mapping[str, str] = field(default_factory=dict)
    binds: tuple[Bind, ...] = ()
    host_ipc: bool = False


@dataclass(frozen=True)
class Container:
    """What a contained kernel has beside. `host` is the address at which its port is published, and
    `free_ports` those of which the engine may choose one now; `devices` are those granted. `addresses` are
    those of `names`, all kernels of its session, empty for a session of one. `credential` asks for user and
    password of the image's registry, both empty if there are none."""

    spec: fleet_pb2.KernelSpec
    agent: str
    host: str
    hostname: str
    devices: tuple[fleet_pb2.Device, ...]
    credential: Callable[[], Awaitable[tuple[str, str]]]
    free_ports: Callable[[], Awaitable[range]]
    names: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    @property
    def strict(self) -> bool:
        return self.spec.security_profile == fleet_pb2.SECURITY_PROFILE_STRICT

    @property
    def shares_network(self) -> bool:
        """Whether it has the node's network: its session is on several, without an overlay."""
        return bool(self.names) and not clusters.own_network(self.spec.cluster)


# Told what goes on while a kernel is started, for people, and how far the fetching of its image is.
Tell = Callable[[str, fleet_pb2.ImagePull | None], None]


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
    # What pins it to a NUMA node: cores and memory nodes in the kernel's own notation, empty for anywhere.
    cpus: str = ""
    memory_nodes: str = ""
    # None for a session of one.
    cluster: ClusterFiles | None = None
    # For a back end that contains.
    container: Container | None = None
    injection: Injection = Injection()


@dataclass(frozen=True)
class Ended:
    """How a kernel ended: the words of `KernelExit`. `by_wish` is set when it had been told to stop."""

    reason: str
    code: int
    message: str
    by_wish: bool = False


@dataclass(frozen=True)
class Observation:
    """What is seen of a kernel. `started_at_s` is CLOCK_BOOTTIME at the start of its command, 0 before;
    `port` is where the node publishes its port, 0 where it binds the one that it was given."""

    pid: int = 0
    started_at_s: float = 0.0
    message: str = ""
    ended: Ended | None = None
    port: int = 0


@dataclass(frozen=True)
class Abilities:
    """What a back end can do on this node; `limitations` are sentences for people."""

    maps_mounts: bool
    runs_images: bool
    limitations: tuple[str, ...] = field(default=())
    # Whether kernels can have the profile STRICT.
    can_be_strict: bool = False
    # Why GPUs of an accelerator, by its name, cannot be given to kernels; what is not named can.
    no_devices: Mapping[str, str] = field(default_factory=dict)
    # Why kernels cannot be pinned to NUMA nodes; empty if they can.
    no_pinning: str = ""
    # What Hello says of networks over several nodes.
    overlay: str = ""
    makes_overlay: bool = False


class StartFailed(Exception):
    """A kernel that cannot be started; `reason` is a word of `KernelExit`."""

    def __init__(self, message: str, reason: str = "START_FAILED") -> None:
        super().__init__(message)
        self.reason = reason


class Backend(Protocol):
    """Runs kernels. Every verb may be called again after a crash at any point of it."""

    name: str
    # Whether its kernels are contained.
    contains: bool

    def model_place(self, model: Path | None, target: str) -> str:
        """Where a kernel will see the model folder `model` that should appear at `target`."""

    async def probe(self) -> Abilities:
        """Finds out what works here; called once, before anything else."""

    async def run(self) -> None:
        """What it does beside, until it is cancelled; it may return. Its other verbs work without."""

    async def close(self) -> None:
        """Lets go of everything; kernels run on."""

    async def find(self) -> list[fleet_pb2.KernelSpec]:
        """Kernels of this agent that are there though the agent's folder may know nothing of them."""

    async def prepare(self, handle: Handle, spec: fleet_pb2.KernelSpec) -> None:
        """Makes what the session's kernels on other nodes wait for, before this one's folders and image are
        fetched and its turn comes, which may take long. Raises StartFailed."""

    async def start(self, plan: Plan, tell: Tell) -> None:
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

    async def complaint(self, handle: Handle, host: str, port: int) -> str:
        """Empty if who comes to `host:port` reaches a program of the kernel's own, else a sentence. A
        program of the kernel answers there, or nobody does."""

    def measure(self, handle: Handle) -> Usage | None:
        """What the kernel has used; None if that cannot be told. Blocks for well under a millisecond, and is
        called from a thread of its own."""

    def log_tail(self, handle: Handle, bytes_max: int) -> str:
        """The end of its log."""

    def write_exit(self, handle: Handle, ended: Ended) -> None:
        """Keeps an end that the back end did not see: a start that failed."""
