"""Asks the worker, and replaces one that does not answer. Blocks, never longer than it is told."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
ANSWER_BYTES_MAX = 8 * 2**20
_ROOT = str(Path(__file__).parents[3])
_WORKER = f"import sys; sys.path.insert(0, {_ROOT!r}); from dure.agent.nvml.worker import main; main()"


class NoAnswer(Exception):
    """The worker was given up: its driver hangs, or it died. The next question goes to a new one."""


def library_is_there() -> bool:
    """Whether there is an NVIDIA driver to ask. Looks at the file only; the driver is not spoken to."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


class Client:
    """May be used from several threads; one question is asked at a time. The worker ends with its agent,
    however that ends: its input is closed then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._given_up: subprocess.Popen[bytes] | None = None

    def ask(self, question: str, limit_s: float) -> dict[str, Any]:
        """Raises NoAnswer after `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        if not self._lock.acquire(timeout=limit_s):
            raise NoAnswer("another question is still waiting for its answer")
        try:
            process = self._running()
            answer = _exchange(process, question, deadline_s)
            if answer is None:
                self._give_up(process)
                raise NoAnswer(f"NVML did not answer within {limit_s:g} s")
            return answer
        except (OSError, ValueError) as error:
            if self._process is not None:
                self._give_up(self._process)
            raise NoAnswer(f"the process that asks NVML died ({error})") from error
        finally:
            self._lock.release()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._given_up is not None:
            # A process within a driver's call can outlive SIGKILL; more of them would help nobody.
            if self._given_up.poll() is None:
                raise NoAnswer("NVML holds the process that was killed for not answering")
            self._given_up = None
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process

    def _give_up(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            return
        self._given_up = process


def _exchange(process: subprocess.Popen[bytes], question: str, deadline_s: float) -> dict[str, Any] | None:
    """None if the time is over. Raises OSError or ValueError if the worker has died."""
    assert process.stdin is not None
    assert process.stdout is not None
    os.write(process.stdin.fileno(), question.encode("ascii") + b"\n")
    answer = b""
    poll = select.poll()
    poll.register(process.stdout.fileno(), select.POLLIN)
    while not answer.endswith(b"\n"):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            return None
        piece = os.read(process.stdout.fileno(), 65536)
        if not piece or len(answer) > ANSWER_BYTES_MAX:
            raise ValueError("no whole answer")
        answer += piece
    decoded: dict[str, Any] = json.loads(answer)
    return decoded
