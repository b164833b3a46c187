"""The stand-in for NVIDIA's library is like the real one: to its header, its bindings, another's tool."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.stand_in import FOUR_GPUS, GpuNode, functions, header, needs_cc

GIB = 2**30
pytestmark = needs_cc
FIRST, SECOND, _, FOURTH = (gpu["uuid"] for gpu in FOUR_GPUS["gpus"])


def ask(node: GpuNode, program: str, limit_s: float = 30.0) -> str:
    """What a program of its own prints that has imported the real pynvml."""
    done = subprocess.run(
        [*node.prefix, sys.executable, "-c", f"from pynvml import *; nvmlInit()\n{program}"],
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_every_prototype_is_that_of_nvidias_header(tmp_path: Path) -> None:
    known = header()
    if known is None:
        pytest.skip("needs NVIDIA's header (PyPI nvidia-nvml-dev)")
    # The compiler compares: a warning is an error, see `build`.
    node = GpuNode(tmp_path)
    wrong = tmp_path / "wrong.c"
    wrong.write_text("#include <nvml.h>\nnvmlReturn_t nvmlDeviceGetCount_v2(int *count) { return *count; }\n")
    done = subprocess.run(
        ["cc", "-c", f"-I{known.parent}", "-o", "/dev/null", str(wrong)], capture_output=True, check=False
    )
    assert done.returncode != 0 and b"conflicting types" in done.stderr
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", str(node.library / "libnvidia-ml.so.1")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert functions() <= set(re.findall(r" T (nvml\w+)", exported)) and len(functions()) > 350


def test_without_the_header_it_is_built_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.stand_in.header", lambda: None)
    assert ask(GpuNode(tmp_path), "print(nvmlDeviceGetCount())") == "4"


def test_pynvml_reads_all_of_it_back(tmp_path: Path) -> None:
    node = GpuNode(tmp_path)
    node.state["gpus"][0]["processes"] = [{"pid": 4711, "memory": GIB, "util": 30}]
    node.write()
    program = """
import json
found = []
for index in range(nvmlDeviceGetCount()):
    one = nvmlDeviceGetHandleByIndex(index)
    parts = []
    if nvmlDeviceGetMigMode(one)[0]:
        for place in range(nvmlDeviceGetMaxMigDeviceCount(one)):
            try:
                part = nvmlDeviceGetMigDeviceHandleByIndex(one, place)
            except NVMLError_NotFound:
                continue
            parts.append({"uuid": nvmlDeviceGetUUID(part), "name": nvmlDeviceGetName(part),
                          "memory": nvmlDeviceGetMemoryInfo(part).total,
                          "slices": nvmlDeviceGetAttributes(part).gpuInstanceSliceCount})
            parent = nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)
            assert nvmlDeviceGetUUID(parent) == nvmlDeviceGetUUID(one)
    found.append({"uuid": nvmlDeviceGetUUID(one), "name": nvmlDeviceGetName(one),
                  "pci": nvmlDeviceGetPciInfo(one).busId.lower()[4:],
                  "memory": nvmlDeviceGetMemoryInfo(one).total,
                  "numa": nvmlDeviceGetMemoryAffinity(one, 1, 0)[0].bit_length() - 1,
                  **({"parts": parts} if parts else {})})
first = nvmlDeviceGetHandleByUUID(found[0]["uuid"])
used = nvmlDeviceGetComputeRunningProcesses(first)
assert [(one.pid, one.usedGpuMemory) for one in used] == [(4711, 2 ** 30)]
assert nvmlDeviceGetMemoryInfo(first).used == 2 ** 30 and nvmlDeviceGetUtilizationRates(first).gpu == 30
assert {one.smUtil for one in nvmlDeviceGetProcessUtilization(first, 0) if one.pid} == {20, 40}
print(json.dumps(found))
"""
    told = [
        {key: value for key, value in gpu.items() if key not in ("links", "mig_slices_max")}
        for gpu in FOUR_GPUS["gpus"]
    ]
    assert json.loads(ask(node, program)) == told


def test_a_call_can_be_made_to_fail_or_to_hang(tmp_path: Path) -> None:
    node = GpuNode(tmp_path)
    names = "print([nvmlDeviceGetName(nvmlDeviceGetHandleByIndex(i)) for i in range(2)])"
    node.state["fail"] = {"Name": 999}
    node.write()
    assert ask(node, names).endswith("Unknown Error")
    node.state["fail"] = {}
    node.state["gpus"][1]["fail"] = {"Name": 16}
    node.write()
    assert ask(node, names).startswith("pynvml.NVMLError_ResetRequired")
    node.state["gpus"][1] = {**node.state["gpus"][1], "fail": {}, "lost": True}
    node.write()
    assert ask(node, names).endswith("GPU is lost")
    node.state["gpus"][1]["lost"] = False
    node.state["hang"] = ["Name"]
    node.write()
    with pytest.raises(subprocess.TimeoutExpired):
        ask(node, names, limit_s=2)
    assert ask(node, "print(nvmlDeviceGetCount())") == "4"
    node.unload()
    assert ask(node, "").endswith("Driver Not Loaded")


def test_a_process_uses_a_gpu_as_long_as_it_lives(tmp_path: Path) -> None:
    node = GpuNode(tmp_path)
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": f"{FIRST},{SECOND}"}
    # As a container would: in a namespace of pids of its own.
    inside = ["unshare", "--pid", "--fork", "--kill-child"] if os.geteuid() == 0 else []
    command = [*inside, *node.user(5 * GIB, 20, "mps")]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline().startswith("uses")
        pid = program.pid
        if inside:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        both = "for i in range(2) for one in CALL(nvmlDeviceGetHandleByIndex(i))"
        used = f"print([(one.pid, one.usedGpuMemory) {both}])"
        clients = used.replace("CALL", "nvmlDeviceGetMPSComputeRunningProcesses")
        assert ask(node, clients) == str([(pid, 5 * GIB)] * 2)
        assert ask(node, used.replace("CALL", "nvmlDeviceGetComputeRunningProcesses")) == "[]"
        os.kill(pid, signal.SIGKILL)
        program.wait(10)
        assert ask(node, clients) == "[]"


def test_an_outside_tool_shows_the_node(tmp_path: Path) -> None:
    if importlib.util.find_spec("nvitop") is None:
        pytest.skip("needs nvitop")
    node = GpuNode(tmp_path)
    environ = {**os.environ, **node.environ, "CUDA_VISIBLE_DEVICES": FIRST, "COLUMNS": "120", "TERM": "xterm"}
    with subprocess.Popen(node.user(5 * GIB, 20), env=environ, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        program.stdout.readline()
        del environ["CUDA_VISIBLE_DEVICES"]
        shown = subprocess.run(
            [sys.executable, "-m", "nvitop", "--once", "--ascii"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        program.kill()
    assert shown.returncode == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    for said in (
        "Driver Version: 580.65.06 CUDA Driver Version: 13.0",
        "0 A100-SXM4-40GB",
        "5120MiB / 40.00GiB | 20%",
        "2 L40S",
        "3:0 3g.40gb @ GI/CI: 1/0",
        "3:1 1g.10gb @ GI/CI: 2/0 | 0B / 9984MiB",
        f"| 0 {program.pid} C",
    ):
        assert said in words, shown.stdout
