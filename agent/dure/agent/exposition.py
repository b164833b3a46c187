"""The agent's /metrics: its kernels, what they use, its work, its stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dure.agent.counts import Counts
from dure.agent.kernel import Phase
from dure.agent.measurer import Measured
from dure.fleet.v1 import fleet_pb2
from dure.wire.prometheus import Labels, Page

# Name of a value of `KernelMeasurement`: the family's end, what it says, and what to multiply it with.
_USAGE = {
    "cpu_used": ("cpu_cores", "Cores that the kernel uses", 1.0),
    "cpu_util": ("cpu_ratio", "Share of the granted cores that it uses", 0.01),
    "mem": ("memory_bytes", "Memory that it uses", 1.0),
    "mem_util": ("memory_ratio", "Share of the granted memory that it uses", 0.01),
    "disk_read": ("disk_read_bytes_per_second", "Bytes that it reads from disks", 1.0),
    "disk_write": ("disk_written_bytes_per_second", "Bytes that it writes to disks", 1.0),
    "net_rx": ("network_received_bytes_per_second", "Bytes that it receives", 1.0),
    "net_tx": ("network_sent_bytes_per_second", "Bytes that it sends", 1.0),
    "cuda_util": ("cuda_ratio", "Share of the granted GPU time that it uses", 0.01),
    "cuda_mem": ("cuda_memory_bytes", "GPU memory that it uses", 1.0),
    "cuda_mem_util": ("cuda_memory_ratio", "Share of the granted GPU memory that it uses", 0.01),
}
# Of one node, more than run on any; what is beyond them is left out.
KERNELS_MAX = 1_000
_NOT_HERE = (Phase.UNKNOWN, Phase.GONE)


def render(
    *,
    agent: str,
    version: str,
    connected: bool,
    streams: int,
    phases: Mapping[Phase, int],
    newest: Mapping[str, Measured],
    devices: Sequence[fleet_pb2.Device],
    counts: Counts,
) -> str:
    page = Page()
    page.gauges("dure_agent_info", "Always 1", [({"agent": agent, "version": version}, 1)])
    page.gauge("dure_agent_manager_connected", "Whether the stream to the manager is open", connected)
    page.total("dure_agent_streams_total", "Streams to the manager that were opened", streams)
    page.gauges(
        "dure_agent_kernels",
        "Kernels by phase",
        [({"phase": phase.name}, phases.get(phase, 0)) for phase in Phase if phase not in _NOT_HERE],
    )
    if devices:
        page.gauges(
            "dure_agent_device_healthy",
            "Whether the device can be given to kernels",
            [({"device": one.id, "model": one.model}, one.healthy) for one in devices],
        )
    page.counter("dure_agent_probes_total", "Health probes by outcome", counts.probes)
    page.histogram(
        "dure_agent_kernel_start_duration_seconds",
        "From taking a kernel up to its command running",
        counts.started,
    )
    page.counter(
        "dure_agent_kernel_ends_total", "Kernels that ended, or never started, by reason", counts.ends
    )
    page.histogram(
        "dure_agent_measure_duration_seconds", "Time of a round of measuring all kernels", counts.measured
    )
    measured = [(_labels(uid, one), one.values) for uid, one in list(newest.items())[:KERNELS_MAX]]
    for name, (family, text, factor) in _USAGE.items():
        found = [(labels, values[name] * factor) for labels, values in measured if name in values]
        if found:
            page.gauges(f"dure_agent_kernel_{family}", text, found)
    return page.render()


def _labels(uid: str, measured: Measured) -> Labels:
    spec = measured.spec
    return {"project": spec.project, "endpoint": spec.endpoint, "replica": spec.replica_uid, "kernel": uid}
