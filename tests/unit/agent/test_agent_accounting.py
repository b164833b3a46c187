"""What files of control groups and of /proc say."""

import os
import subprocess
import sys
import time
from pathlib import Path

from dure.agent.backends import accounting
from dure.agent.backends.accounting import Groups, ProcessTable, look


def write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_v1_files(tmp_path: Path) -> None:
    cpu = write(
        tmp_path / "cpu", cpuacct__usage="2500000000\n", cpu__stat="nr_periods 0\n", cgroup__procs="7\n9\n"
    )
    memory = write(
        tmp_path / "memory",
        memory__usage_in_bytes="1000000\n",
        memory__stat="cache 700000\ninactive_file 1\ntotal_cache 700000\ntotal_inactive_file 300000\n",
    )
    groups = Groups([cpu, memory])
    assert (groups.cpu_s(), groups.memory_bytes(), groups.disk_bytes()) == (2.5, 700_000, None)
    assert groups.pids() == [7, 9]
    assert (groups.tells_cpu, groups.tells_memory, groups.tells_disk) == (True, True, False)


def test_v2_files(tmp_path: Path) -> None:
    group = write(
        tmp_path / "v2",
        cpu__stat="usage_usec 1500000\nuser_usec 1\n",
        memory__current="5000\n",
        memory__stat="anon 10\nfile 20\ninactive_file 2000\n",
        io__stat="8:0 rbytes=100 wbytes=200 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=2 rios=0\n",
        cgroup__procs="",
    )
    groups = Groups([group])
    assert (groups.cpu_s(), groups.memory_bytes(), groups.disk_bytes()) == (1.5, 3000, (101, 202))
    assert groups.pids() == []


def test_a_hybrid_host_tells_cpu_in_its_v2_group(tmp_path: Path) -> None:
    v1 = write(tmp_path / "cpu", cpu__stat="nr_periods 5\nnr_throttled 0\n")
    v2 = write(tmp_path / "unified", cpu__stat="usage_usec 250000\n")
    assert Groups([v1, v2]).cpu_s() == 0.25


def test_a_group_that_goes_away_tells_nothing_and_is_not_replaced_by_another_counter(tmp_path: Path) -> None:
    group = write(tmp_path / "g", cpu__stat="usage_usec 250000\n", memory__current="1\n", memory__stat="")
    groups = Groups([group])
    for file in group.iterdir():
        file.unlink()
    found = look(groups, ProcessTable(), os.getpid())
    assert (found.cpu_s, found.memory_bytes) == (None, None)
    assert found.disk_read_bytes is None or found.disk_read_bytes >= 0


# Burns time in a child of a child, lets it end, and collects it when told to.
_FAMILY = """
import os, subprocess, sys, time
burn = "import time; e = time.process_time() + 0.3\\nwhile time.process_time() < e: pass"
print("ready", flush=True)
for line in sys.stdin:
    subprocess.run([sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])", burn])
    print("done", flush=True)
"""  # noqa: E501


def test_without_groups_a_tree_counts_children_that_came_and_went() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        table = ProcessTable()
        before = look(Groups([]), table, process.pid)
        process.stdin.write("burn\n")
        process.stdin.flush()
        newest, ended_s = before, time.monotonic() + 20
        while os.path.exists(f"/proc/{process.pid}") and time.monotonic() < ended_s:
            now = look(Groups([]), table, process.pid)
            assert now.cpu_s is not None and newest.cpu_s is not None
            assert now.cpu_s >= newest.cpu_s - 1e-9
            newest = now
            if now.cpu_s - (before.cpu_s or 0) >= 0.3:
                break
        assert process.stdout.readline() == "done\n"
        after = look(Groups([]), table, process.pid)
        assert (after.cpu_s or 0) - (before.cpu_s or 0) >= 0.29
        assert after.memory_bytes is not None and after.memory_bytes > 2**20
    finally:
        process.kill()
        process.communicate()


def test_the_memory_of_a_tree_counts_what_is_shared_once() -> None:
    own = accounting.memory_of([os.getpid()])
    assert own is not None
    assert own > 2**20
    twice = accounting.memory_of([os.getpid(), os.getpid()])
    assert twice is not None and own < twice < own * 2


def test_processes_that_are_gone_tell_nothing() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert accounting.cpu_of([process.pid]) is None
    assert accounting.memory_of([process.pid]) is None
    assert accounting.disk_of([process.pid]) is None


def test_descent_is_looked_at_once_a_round() -> None:
    table = ProcessTable()
    assert table.tree(os.getpid())[0] == os.getpid()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        deadline_s = time.monotonic() + 5
        while process.pid not in table.tree(os.getpid()):
            assert time.monotonic() < deadline_s
    finally:
        process.communicate(b"\n")
