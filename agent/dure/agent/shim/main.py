"""The shim's loop: log, signals, deadlines; see the package for the files it keeps."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from typing import Any

from dure.agent.shim import processes
from dure.agent.shim.files import read_json, write_json
from dure.agent.shim.log import LineLog

PR_SET_CHILD_SUBREAPER = 36
# Once the main process is gone, what it left behind gets this long to follow.
LEFTOVERS_S = 1.0
END_LIMIT_S = 10.0


class Shim:
    """One session from start to end."""

    def __init__(self, folder: str, plan: dict[str, Any]) -> None:
        self._folder = folder
        self._plan = plan
        self._log = LineLog(folder)
        self._state: dict[str, Any] = {
            "shim_pid": os.getpid(),
            "shim_start": processes.start_ticks(os.getpid()),
            "phase": "preparing",
            "pid": 0,
            "started_at": 0.0,
            "message": "",
        }
        self._output, self._output_end = os.pipe()
        self._progress, self._progress_end = os.pipe()
        self._wake, self._wake_end = os.pipe()
        self._progress_open = True
        self._progress_text = b""
        self._failed: dict[str, Any] | None = None
        self._told_exec = False
        self._status: int | None = None
        self._stop_at: float | None = None
        self._kill_at: float | None = None
        for descriptor in (self._output, self._progress, self._wake, self._wake_end):
            os.set_blocking(descriptor, False)

    def run(self) -> None:
        signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._note()
        self._main = self._fork()
        self._state["pid"] = self._main
        self._note()
        self._loop()
        processes.end_all_below(self._plan["cgroup_kill"], END_LIMIT_S)
        self._drain()
        self._write_exit()

    def _fork(self) -> int:
        # A stop that comes while the child still has this process's handlers must not get lost in them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            os.close(self._output_end)
            os.close(self._progress_end)
            return pid
        signal.set_wakeup_fd(-1)
        os.dup2(self._output_end, 1)
        os.dup2(self._output_end, 2)
        from dure.agent.shim.inside import become

        become(self._plan, self._progress_end)
        raise AssertionError("unreachable")

    def _loop(self) -> None:
        poll = select.poll()
        for descriptor in (self._output, self._progress, self._wake):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll(self._timeout_ms()):
                if descriptor == self._output and not self._read_output():
                    poll.unregister(self._output)
                elif descriptor == self._progress and not self._read_progress():
                    poll.unregister(self._progress)
                    self._progress_open = False
                elif descriptor == self._wake:
                    self._take_signals()
            self._reap()
            now = time.monotonic()
            if self._status is not None and (self._stop_at is None or not processes.descendants(os.getpid())):
                return
            if self._kill_at is not None and now >= self._kill_at:
                return

    def _timeout_ms(self) -> int | None:
        if self._kill_at is None:
            return None
        # The end of processes that are not children of this one makes no signal: look again soon.
        left = max(0.0, self._kill_at - time.monotonic())
        return int(min(left, 0.02 if self._status is not None else left) * 1000) + 1

    def _take_signals(self) -> None:
        numbers = os.read(self._wake, 4096)
        now = time.monotonic()
        if signal.SIGUSR1 in numbers:
            self._stop_at, self._kill_at = now, now
        elif signal.SIGTERM in numbers and self._stop_at is None:
            self._stop_at, self._kill_at = now, now + self._plan["stop_grace_s"]
            for pid in processes.descendants(os.getpid()):
                processes.send(pid, signal.SIGTERM)

    def _reap(self) -> None:
        dead = processes.reap()
        if self._main in dead:
            while self._progress_open and self._read_progress():
                pass
            self._status = dead[self._main]
            if self._kill_at is not None:
                self._kill_at = min(self._kill_at, time.monotonic() + LEFTOVERS_S)

    def _read_output(self) -> bool:
        data = os.read(self._output, 65536)
        self._log.write(data)
        return bool(data)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            # A pipe holds 64 KiB by default; one that a survivor keeps filling must not hold this up.
            for _ in range(32):
                if not self._read_output():
                    return

    def _read_progress(self) -> bool:
        """False at the end, or if there is nothing (then the main process is already gone)."""
        try:
            data = os.read(self._progress, 65536)
        except BlockingIOError:
            return False
        if not data:
            if self._told_exec and self._failed is None and self._state["phase"] == "preparing":
                self._state |= {
                    "phase": "running",
                    "started_at": time.clock_gettime(time.CLOCK_BOOTTIME),
                    "message": "",
                }
                self._note()
            return False
        *lines, self._progress_text = (self._progress_text + data).split(b"\n")
        for line in lines:
            content = json.loads(line)
            self._told_exec = self._told_exec or "exec" in content
            self._failed = content.get("failed", self._failed)
            if "message" in content:
                self._state["message"] = content["message"]
                self._note()
        return True

    def _write_exit(self) -> None:
        status = self._status if self._status is not None else signal.SIGKILL
        by_signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        record: dict[str, Any] = {
            "stage": "command" if self._told_exec and self._failed is None else "setup",
            "signal": by_signal,
            "code": 128 + by_signal if by_signal else os.WEXITSTATUS(status),
            "oom": self._ooms() > 0,
            "stopped": self._stop_at is not None,
            "message": "",
        }
        write_json(f"{self._folder}/exit.json", record | (self._failed or {}))

    def _ooms(self) -> int:
        if not self._plan["oom_file"]:
            return 0
        try:
            with open(self._plan["oom_file"], encoding="ascii") as file:
                counts = dict(line.split() for line in file)
        except OSError:
            return 0
        return int(counts.get("oom_kill", 0))

    def _note(self) -> None:
        write_json(f"{self._folder}/state.json", self._state)
        try:
            # No reader: no agent runs, and the next one reads the file.
            descriptor = os.open(f"{self._folder}/notify", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(descriptor, b"\n")
        os.close(descriptor)


def main() -> None:
    """`main.py FOLDER` runs a session; `main.py --probe STAGE SOURCE` tells whether mounts can be mapped."""
    if sys.argv[1] == "--probe":
        _probe(*sys.argv[2:])
        return
    folder = sys.argv[1]
    # Whatever library of the agent opened a descriptor without close-on-exec.
    os.closerange(3, 65536)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    plan = read_json(f"{folder}/plan.json")
    if plan is None:
        raise SystemExit(f"no plan in {folder}")
    Shim(folder, plan).run()


def _probe(stage: str, source: str) -> None:
    from dure.agent.shim.namespace import View

    try:
        view = View()
        view.enter(stage)
        view.bind(source, "/dure-probe/models", read_only=True)
        view.close()
        with open("/dure-probe/models/file", encoding="ascii") as file:
            file.read()
    except OSError as error:
        raise SystemExit(str(error)) from error
    try:
        os.mkdir("/dure-probe/models/folder")
    except OSError:
        return
    raise SystemExit("the mapped folder can be written")
