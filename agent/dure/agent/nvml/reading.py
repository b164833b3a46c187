"""What NVML tells, as plain values that can be sent as JSON. A GPU that does not answer never hides the
others."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pynvml

# Pairs grow with the square, and no machine has more.
TOPOLOGY_GPUS_MAX = 32
NVLINK = 0
# What GPUs and drivers answer that do not know of something.
_NOT_TOLD = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_InvalidArgument,
)
# Words of 64 bits that a set of NUMA nodes is read in.
_NODE_WORDS = 16


class Reader:
    """Holds NVML open as long as nothing goes wrong; begins anew after that, or a GPU that came back would
    not be seen."""

    def __init__(self) -> None:
        self._open = False
        # Newest sample of utilisation seen of each GPU, in the driver's microseconds.
        self._seen_us: dict[str, int] = {}
        # Ways between GPUs, which do not change while they are the same GPUs.
        self._peers_of: tuple[str, ...] = ()
        self._peers: dict[str, dict[str, int]] = {}

    def devices(self) -> dict[str, Any]:
        """`gpus`, each with `index`; `error` is empty unless NVML as a whole fails."""
        try:
            self._begin()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self._end()
            return {"error": str(error), "gpus": []}
        gpus = [_gpu(index) for index in range(count)]
        self._add_peers(gpus)
        if any(gpu["error"] for gpu in gpus):
            self._end()
        return {"error": "", "gpus": gpus}

    def uses(self) -> dict[str, Any]:
        """Of each GPU and part by its id: `util` (percent by pid) and `memory` (bytes by pid), or None for
        what the driver does not tell."""
        found: dict[str, Any] = {}
        try:
            self._begin()
            for index in range(pynvml.nvmlDeviceGetCount()):
                for handle in _offered(pynvml.nvmlDeviceGetHandleByIndex(index)):
                    uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
                    found[uuid] = {"util": self._util(uuid, handle), "memory": memory_by_pid(handle)[0]}
        except pynvml.NVMLError:
            self._end()
        return found

    def _util(self, uuid: str, handle: Any) -> dict[int, float] | None:
        """Averaged over the samples since the last look; None for a GPU in MIG mode, or an old one."""
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
        return {pid: sum(values) / len(values) for pid, values in by_pid.items()}

    def _add_peers(self, gpus: list[dict[str, Any]]) -> None:
        whole = {gpu["id"]: gpu["index"] for gpu in gpus if gpu["id"] and not gpu["mig"] and not gpu["error"]}
        if tuple(whole) != self._peers_of:
            try:
                self._peers_of, self._peers = tuple(whole), _all_peers(whole)
            except pynvml.NVMLError:
                # One of them broke while they were asked: asked again at the next look.
                self._peers_of, self._peers = (), {}
        for gpu in gpus:
            gpu["peers"] = self._peers.get(gpu["id"], {})

    def _begin(self) -> None:
        if not self._open:
            pynvml.nvmlInit()
            self._open = True

    def _end(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def memory_by_pid(handle: Any) -> tuple[dict[int, int] | None, list[int]]:
    """Bytes by pid (None: the driver does not tell), and which of the pids are clients of MPS."""
    used: dict[int, int] = {}
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None, []
    clients: list[Any] = []
    # GPUs of data centres may know no graphics, and old drivers no MPS.
    with contextlib.suppress(pynvml.NVMLError):
        running += pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
    with contextlib.suppress(pynvml.NVMLError):
        clients = pynvml.nvmlDeviceGetMPSComputeRunningProcesses(handle)
    for process in [*running, *clients]:
        if process.usedGpuMemory is None:
            # Not counted, a process could hold all of the memory and be taken for one that holds none.
            return None, []
        # A process that computes and draws stands in both lists with all of its memory.
        used[int(process.pid)] = max(used.get(int(process.pid), 0), int(process.usedGpuMemory))
    return used, [int(process.pid) for process in clients]


def _gpu(index: int) -> dict[str, Any]:
    """`id` is empty if not even that can be read; `lost` says that the GPU fell off the bus."""
    gpu: dict[str, Any] = {
        "index": index, "id": "", "model": "", "memory_bytes": 0, "numa": None, "mig": False, "slices_max": 0,
        "parts": [], "memory": None, "mps": [], "error": "", "lost": False,
    }  # fmt: skip
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        gpu["id"] = _text(pynvml.nvmlDeviceGetUUID(handle))
        gpu["model"] = _text(pynvml.nvmlDeviceGetName(handle))
        gpu["memory_bytes"] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        gpu["mig"] = _in_mig_mode(handle)
        if gpu["mig"]:
            gpu["slices_max"] = int(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle))
            gpu["parts"] = [_part(part) for part in _offered(handle)]
        else:
            gpu["memory"], gpu["mps"] = memory_by_pid(handle)
    except pynvml.NVMLError as error:
        gpu["error"] = str(error)
        gpu["lost"] = error.value in (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
        return gpu
    gpu["numa"] = _numa_node(handle)
    return gpu


def _numa_node(handle: Any) -> int | None:
    """The one node whose memory is nearest. Not `nvmlDeviceGetNumaNodeId`: that is the node which a GPU
    itself is, on machines where it is one, and it has no cores."""
    try:
        words = pynvml.nvmlDeviceGetMemoryAffinity(handle, _NODE_WORDS, pynvml.NVML_AFFINITY_SCOPE_NODE)
    except pynvml.NVMLError:
        return None
    nodes = sum(int(word) << (64 * place) for place, word in enumerate(words))
    return nodes.bit_length() - 1 if nodes.bit_count() == 1 else None


def _part(handle: Any) -> dict[str, Any]:
    memory, mps = memory_by_pid(handle)
    attributes = pynvml.nvmlDeviceGetAttributes(handle)
    return {
        "id": _text(pynvml.nvmlDeviceGetUUID(handle)),
        "model": _text(pynvml.nvmlDeviceGetName(handle)),
        "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        # A part's compute can be divided once more, and only its compute.
        "slices": int(attributes.computeInstanceSliceCount or attributes.gpuInstanceSliceCount),
        "memory": memory,
        "mps": mps,
    }


def _in_mig_mode(handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError as error:
        if error.value in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            return False
        raise


def _offered(handle: Any) -> Iterator[Any]:
    """The GPU itself, or its parts if it is in MIG mode."""
    if not _in_mig_mode(handle):
        yield handle
        return
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except pynvml.NVMLError as error:
            # There is none at this place.
            if error.value not in (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                raise


def _all_peers(whole: dict[str, int]) -> dict[str, dict[str, int]]:
    if not 1 < len(whole) <= TOPOLOGY_GPUS_MAX:
        return {}
    found: dict[str, dict[str, int]] = {}
    for first, first_index in whole.items():
        for second, second_index in whole.items():
            if first == second:
                continue
            with contextlib.suppress(*_NOT_TOLD):
                one = pynvml.nvmlDeviceGetHandleByIndex(first_index)
                other = pynvml.nvmlDeviceGetHandleByIndex(second_index)
                found.setdefault(first, {})[second] = _distance(one, other)
    return found


def _distance(one: Any, other: Any) -> int:
    with contextlib.suppress(*_NOT_TOLD):
        status = pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if status == pynvml.NVML_P2P_STATUS_OK:
            return NVLINK
    # NVML's levels are 0 (one board) to 50 (across); 0 is NVLink's here, and a board has a switch.
    return max(10, int(pynvml.nvmlDeviceGetTopologyCommonAncestor(one, other)))


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
