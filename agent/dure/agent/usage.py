"""What a kernel uses, as the numbers that scaling rules name: a function of two looks and of its grant.

Rates come from two looks at counters that only grow. A counter that went back (a process whose parent never
asked how it ended took its share along, a group was made anew) gives no rate this time: it never becomes
negative, and never a guess.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

MILLI = 1000


@dataclass(frozen=True)
class Usage:
    """One look at all processes of a kernel, at a time of the monotonic clock. None: it cannot be told.

    All but the memory are counters since the kernel's start.
    """

    at_s: float
    cpu_s: float | None = None
    memory_bytes: int | None = None
    disk_read_bytes: int | None = None
    disk_written_bytes: int | None = None
    # Only where the kernel has a network of its own.
    net_received_bytes: int | None = None
    net_sent_bytes: int | None = None


@dataclass(frozen=True)
class DeviceUse:
    """What host processes (by pid) use of one device: percent of its time, bytes of its memory. None: the
    driver does not tell."""

    util: Mapping[int, float] | None = None
    memory_bytes: Mapping[int, int] | None = None


@dataclass(frozen=True)
class Grant:
    """A part of a device: milli-units of one whole, and the memory of the whole. A device that is itself a
    part of a GPU is granted as a whole, whatever was asked for."""

    device: str
    share_milli: int
    device_memory_bytes: int
    is_whole: bool = False

    @property
    def memory_bytes(self) -> float:
        return self.device_memory_bytes * (1 if self.is_whole else self.share_milli / MILLI)


def values(before: Usage | None, now: Usage, cpu_milli: int, memory_bytes: int) -> dict[str, float]:
    """By the names of `KernelMeasurement`; one that cannot be told is left out."""
    found: dict[str, float] = {}
    if now.memory_bytes is not None:
        found["mem"] = float(now.memory_bytes)
        if memory_bytes > 0:
            found["mem_util"] = now.memory_bytes * 100 / memory_bytes
    if before is None:
        return found
    span_s = now.at_s - before.at_s
    cores = _rate(before.cpu_s, now.cpu_s, span_s)
    if cores is not None:
        found["cpu_used"] = cores
        if cpu_milli > 0:
            found["cpu_util"] = cores * 100 * MILLI / cpu_milli
    for name, first, second in (
        ("disk_read", before.disk_read_bytes, now.disk_read_bytes),
        ("disk_write", before.disk_written_bytes, now.disk_written_bytes),
        ("net_rx", before.net_received_bytes, now.net_received_bytes),
        ("net_tx", before.net_sent_bytes, now.net_sent_bytes),
    ):
        per_second = _rate(first, second, span_s)
        if per_second is not None:
            found[name] = per_second
    return found


def device_values(
    grants: Sequence[Grant], uses: Mapping[str, DeviceUse], pids: Collection[int]
) -> dict[str, float]:
    """Of the accelerators that were granted. All of them must tell, or the sum would be too small."""
    found: dict[str, float] = {}
    if not grants or any(grant.device not in uses for grant in grants):
        return found
    seen = {grant.device: uses[grant.device] for grant in grants}
    shares = sum(grant.share_milli for grant in grants) / MILLI
    util = [use.util for use in seen.values() if use.util is not None]
    if len(util) == len(seen) and shares > 0:
        found["cuda_util"] = sum(_of(pids, one) for one in util) / shares
    memory = [use.memory_bytes for use in seen.values() if use.memory_bytes is not None]
    if len(memory) == len(seen):
        found["cuda_mem"] = sum(_of(pids, one) for one in memory)
        granted_bytes = sum(grant.memory_bytes for grant in grants)
        if granted_bytes > 0:
            found["cuda_mem_util"] = found["cuda_mem"] * 100 / granted_bytes
    return found


def _of(pids: Iterable[int], by_pid: Mapping[int, float] | Mapping[int, int]) -> float:
    return float(sum(by_pid.get(pid, 0) for pid in pids))


def _rate(before: float | None, now: float | None, span_s: float) -> float | None:
    if before is None or now is None or span_s <= 0 or now < before:
        return None
    return (now - before) / span_s
