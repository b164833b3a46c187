"""The dashboard and the alerts ask for what a real cluster shows."""

from __future__ import annotations

import re
import time
import urllib.request

import monitoring
import tomli
from system.cluster import Cluster

_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? \S+")
# Of histograms a page names the family, of its samples these ends.
_ENDS = ("_bucket", "_sum", "_count")


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_what_is_asked_for_is_shown(dure: Cluster) -> None:
    dure.model("watched")
    dure.dure(
        *(
            "endpoint",
            "create",
            "watched",
            "--model",
            "watched",
            "-r",
            "cpu=0.2",
            "-r",
            "mem=64m",
            "--public",
        ),
        *("--wait", "--timeout", "60"),
    )
    address = dure.get("watched")["address"]
    for _ in range(5):
        urllib.request.urlopen(address, timeout=10).read()
    recorded = tomli.loads((dure.data_dir / "dev.toml").read_text())
    ports = (recorded["proxy_admin_port"], *recorded["metrics_ports"])
    deadline_s = time.monotonic() + 30
    # What a kernel uses is known after two looks at it, five seconds apart.
    while "dure_agent_kernel_cpu_cores{" not in (text := "".join(read(port) for port in ports)):
        assert time.monotonic() < deadline_s, text
        time.sleep(0.2)
    pages = [read(port) for port in ports]
    kinds: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for page in pages:
        for line in page.splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kind = line.split()
                assert kinds.setdefault(name, kind) == kind
            elif found := _SAMPLE.fullmatch(line):
                labels.setdefault(found[1], set()).update(
                    re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or "")
                )
    for one in monitoring.wanted():
        family = next((one.metric.removesuffix(end) for end in _ENDS if one.metric.endswith(end)), one.metric)
        if family.startswith("dure_agent_kernel_cuda_"):
            # Only a node with GPUs has it.
            continue
        assert family in kinds, one
        assert (kinds[family] in ("counter", "histogram")) == one.rated, one
        shown = labels.get(one.metric, set())
        for label, pattern in one.labels if shown else ():
            assert any(name == label and re.fullmatch(pattern, value) for name, value in shown) or (
                # A class of answers that nobody got yet.
                label == "class"
            ), (one, sorted(shown))
    dure.dure("endpoint", "delete", "watched", "--wait")
